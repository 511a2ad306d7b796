"""VRAM Fit around core's sampling: prediction, plan, refusal, what core is told, out-of-memory, cancel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import PACKAGE, TOLERANCE, Core, off_by

pytestmark = pytest.mark.host


def fit_for(core: Core, patcher: Any, usable_bytes: int, **services: Any) -> Any:
    fit = core.native("fit")
    chosen = {"check_cancelled": lambda: None, **services}
    return fit.fitted(patcher, fit.Services(usable_bytes=lambda: usable_bytes, **chosen))[0]


def weights_bytes(patcher: Any) -> int:
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    return management.module_size(patcher.model.diffusion_model)


def plan_of(core: Core, patcher: Any) -> Any:
    """The plan of the last run, for one guidance branch."""
    return patcher.get_attachment(core.native("fit").KEY).plan


def test_with_room_nothing_is_chunked(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    patcher = make_patcher("wan-i2v")
    clone = fit_for(core, patcher, 2**40)
    assert torch.equal(sample(clone), sample(patcher))
    assert plan_of(core, clone).workspace_bytes is None


@pytest.mark.parametrize("name", ["wan-i2v", "minimax_h3-t2v"])
def test_with_less_it_is_chunked_as_little_as_the_weights_beside_it_need(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    patcher = make_patcher(name)
    free = fit_for(core, patcher, 2**40)
    expected = sample(free)
    stock_bytes = plan_of(core, free).stock_bytes
    clone = fit_for(core, patcher, weights_bytes(patcher) + int(0.8 * stock_bytes))
    assert off_by(sample(clone), expected) <= TOLERANCE
    plan = plan_of(core, clone)
    assert plan.workspace_bytes is not None
    assert plan.resident_bytes == weights_bytes(patcher)
    assert plan.needed_bytes <= int(0.8 * stock_bytes)


def test_what_cannot_fit_is_refused_before_the_first_step_with_what_would(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    patcher = make_patcher("wan-t2v")
    called: list[int] = []
    patcher.set_model_patch(lambda given: called.append(1) or {"img": given["img"]}, "double_block")
    error = core.library("errors").DoesNotFitError
    with pytest.raises(error, match=r"320×256×(\d+) with Wan does not fit.*use \d+ frames, or \d+×\d+, or a budget of"):
        sample(fit_for(core, patcher, 12_000_000), latent_shape=(1, 16, 9, 32, 40))
    assert not called


def test_a_model_whose_calls_cannot_be_predicted_runs_as_it_is(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> int:
        raise NotImplementedError("a planted one")

    monkeypatch.setattr(core.native("twin").Twin, "peak_bytes", fails)
    patcher = make_patcher("wan-t2v")
    said: list[str] = []
    assert torch.equal(sample(fit_for(core, patcher, 1, say=said.append)), sample(patcher))
    assert "runs unchunked: the memory of its calls cannot be predicted" in said[0]


def test_out_of_memory_costs_no_step(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """The call that failed is made again, in smaller chunks, and the result is the undisturbed one."""
    patcher = make_patcher("wan-i2v")
    expected = sample(patcher, steps=3)
    said: list[str] = []
    clone = fit_for(core, patcher, 2**40, say=said.append)
    failures = iter([True, False, False, True])
    block = patcher.model.diffusion_model.blocks[1]
    own = block.ffn[0].forward

    def fails(x: torch.Tensor) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("a planted one")
        return own(x)

    block.ffn[0].forward = fails
    try:
        result = sample(clone, steps=3)
    finally:
        del block.ffn[0].forward
    assert off_by(result, expected) <= TOLERANCE
    assert sum(line.startswith("ran out of memory") for line in said) == 2


def test_a_cancel_acts_within_a_call(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    class CancelledError(Exception):
        pass

    chunks = iter(range(10_000))

    def check() -> None:
        if next(chunks) == 25:
            raise CancelledError

    patcher = make_patcher("wan-i2v")
    expected = sample(patcher)
    clone = fit_for(core, patcher, weights_bytes(patcher), check_cancelled=check)
    with pytest.raises(CancelledError):
        sample(clone)
    assert torch.equal(sample(patcher), expected)


def test_a_model_that_is_not_known_runs_as_it_is(core: Core, make_patcher: Callable[..., Any]) -> None:
    patcher = make_patcher("wan-t2v")
    patcher.model.diffusion_model = torch.nn.Linear(2, 2)
    fit = core.native("fit")
    clone, report = fit.fitted(patcher, fit.Services(usable_bytes=lambda: 1, check_cancelled=lambda: None))
    assert "Linear is not known" in report
    assert not clone.object_patches


def test_a_model_that_this_version_of_core_lacks_is_passed_over(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    model = core.native("model")
    monkeypatch.setitem(sys.modules, "comfy.ldm.cogvideo", None)
    monkeypatch.delitem(sys.modules, f"{PACKAGE}.nodes.native.cogvideox", raising=False)
    model._models.cache_clear()
    try:
        names = {it.name for it in model._models()}
    finally:
        model._models.cache_clear()
    assert "Wan" in names
    assert "CogVideoX" not in names
