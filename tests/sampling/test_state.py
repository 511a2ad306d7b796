"""A loop that is interrupted and resumed takes the same steps as one that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from i2v_core.families import bundled_architecture, bundled_models, family_of
from i2v_core.sampling.loop import SampleLoop
from i2v_core.sampling.schedulers import make_scheduler

SCHEDULERS = [
    (model, choice.name)
    for model in bundled_models()
    for choice in family_of(bundled_architecture(model)).facts.schedulers
]
STEPS = 7
NOISE = torch.randn(1, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def scheduler_of(name: tuple[str, str]) -> Any:
    """Make a scheduler by model and name."""
    model, of_family = name
    architecture = bundled_architecture(model)
    choice = family_of(architecture).facts.scheduler(of_family)
    scheduler = make_scheduler(choice, architecture.config("scheduler"))
    scheduler.set_timesteps(STEPS)
    return scheduler


def loop_of(name: tuple[str, str]) -> SampleLoop:
    return SampleLoop(scheduler_of(name), NOISE.clone(), lambda *_: None)


def predict(latents: Tensor, timestep: Tensor) -> Tensor:
    """Return some function of both arguments."""
    return torch.tanh(latents * 0.7 + float(timestep) / 1000)


def stopping_at(step: int) -> Callable[[Tensor, Tensor], Tensor]:
    calls = 0

    def stop(latents: Tensor, timestep: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == step:
            raise torch.OutOfMemoryError
        return predict(latents, timestep)

    return stop


@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_denoiser_that_fails_costs_its_step_alone(name: tuple[str, str], step: int) -> None:
    loop = loop_of(name)
    with pytest.raises(torch.OutOfMemoryError):
        loop.run(stopping_at(step))
    assert loop.steps_done == step - 1
    assert torch.equal(loop.run(predict), loop_of(name).run(predict))


@pytest.mark.parametrize("step", range(1, STEPS + 1))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_that_fails_half_way_has_not_stepped(
    name: tuple[str, str], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail after the step has changed everything that it changes."""
    scheduler = scheduler_of(name)
    whole_step, calls = scheduler.step, 0

    def failing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        result = whole_step(*args)
        if calls == step:
            raise torch.OutOfMemoryError
        return result

    monkeypatch.setattr(type(scheduler), "step", lambda _, *args: failing(*args))
    loop = SampleLoop(scheduler, NOISE.clone(), lambda *_: None)
    with pytest.raises(torch.OutOfMemoryError):
        loop.run(predict)
    interrupted = loop.run(predict)
    monkeypatch.undo()
    assert torch.equal(interrupted, loop_of(name).run(predict))


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_loop_resumes_from_a_state(name: tuple[str, str], step: int) -> None:
    first, second = loop_of(name), loop_of(name)
    if step < STEPS:
        with pytest.raises(torch.OutOfMemoryError):
            first.run(stopping_at(step + 1))
    else:
        first.run(predict)
    state = first.state
    second.resume(state)
    first.run(predict)  # which must not change the state that was taken
    assert torch.equal(second.run(predict), first.latents_BCTHW)
    third = loop_of(name)
    third.resume(state)
    assert third.steps_done == step
    assert torch.equal(third.run(predict), first.latents_BCTHW)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_state_holds_no_more_than_the_last_outputs(name: tuple[str, str]) -> None:
    loop = loop_of(name)
    loop.run(predict)
    tensors = [
        it
        for value in loop.state.scheduler.values()
        for it in (value if isinstance(value, list) else [value])
        if isinstance(it, Tensor) and it.ndim
    ]
    assert len(tensors) <= 3
