"""Memory that core is told a run needs: for one guidance branch, and for those that it can join."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import SMALL_MODELS, Core
from .test_fit import fit_for, plan_of

pytestmark = pytest.mark.host


def conditioned(patcher: Any, *lengths: int, **options: Any) -> dict[str, list[dict[str, Any]]]:
    """A guider's conditions, positive and negative, with texts of these lengths; options are for the first."""
    import comfy.sampler_helpers as helpers  # pyright: ignore[reportMissingImports]

    texts = [
        [torch.zeros(1, length, 4096), dict(options) if index == 0 else {}] for index, length in enumerate(lengths)
    ]
    return {name: helpers.convert_cond([text]) for name, text in zip(("positive", "negative"), texts, strict=False)}


def recorded(core: Core, patcher: Any, conds: Any) -> dict[tuple[int, int], Any]:
    """Calls to come, by their number of branches and their latents' height."""
    return {(it.branches, it.input_shape[-2]): it for it in core.recorded_calls(patcher, conds)}


def text_rows(recorded_call: Any) -> tuple[int, ...]:
    return tuple(recorded_call.call.arguments["context"].shape[:2])


def test_branches_are_recorded_alone_and_together(core: Core, make_patcher: Callable[..., Any]) -> None:
    patcher = make_patcher("wan-t2v")
    calls = recorded(core, patcher, conditioned(patcher, 20, 20))
    assert {key: text_rows(it) for key, it in calls.items()} == {(1, 16): (1, 20), (2, 16): (2, 20)}


def test_branches_that_core_runs_apart_are_not_recorded_together(core: Core, make_patcher: Callable[..., Any]) -> None:
    """Wan's with texts of different lengths are such."""
    patcher = make_patcher("wan-t2v")
    assert {branches for branches, _ in recorded(core, patcher, conditioned(patcher, 20, 30))} == {1}


def test_areas_are_calls_of_their_own(core: Core, make_patcher: Callable[..., Any]) -> None:
    patcher = make_patcher("wan-t2v")
    calls = recorded(core, patcher, conditioned(patcher, 20, 20, area=(3, 8, 24, 0, 0, 0)))
    assert {(1, 16), (1, 8), (2, 8)} <= set(calls)


def told_by(core: Core, clone: Any, sample: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Bytes that core's loading was told for all branches, and for one."""
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    told: list[tuple[float, float]] = []
    load = management.load_models_gpu

    def heard(models: Any, memory_required: float = 0, *args: Any, **kwargs: Any) -> Any:
        told.append((memory_required, kwargs.get("minimum_memory_required", 0)))
        return load(models, memory_required, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", heard)
    sample(clone)
    return told[0]


def test_core_is_told_what_one_branch_and_both_need(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clone = fit_for(core, make_patcher("wan-i2v"), 2**40)
    both, one = told_by(core, clone, sample, monkeypatch)
    assert one == plan_of(core, clone).needed_bytes
    assert 1.8 * one <= both <= 2.2 * one
    assert "memory_required" not in clone.model.__dict__


def test_core_joins_branches_where_both_fit_and_not_where_they_do_not(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    patcher = make_patcher("wan-i2v")
    for room, expected in ((2.5, {2}), (1.5, {1})):
        free = fit_for(core, patcher, 2**40)
        sample(free)
        plan = plan_of(core, free)
        batches: list[int] = []

        def heard(executor: Any, x: Any, *args: Any, batches: list[int] = batches, **kwargs: Any) -> Any:
            batches.append(x.shape[0])
            return executor(x, *args, **kwargs)

        clone = fit_for(core, patcher, plan.weights_bytes + int(room * plan.needed_bytes))
        clone.add_wrapper_with_key(core.extension.WrappersMP.DIFFUSION_MODEL, "heard", heard)
        sample(clone)
        assert set(batches) == expected


def test_a_plan_takes_few_traces(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are what takes time: one where all fits, and few where it does not; two for both branches together."""
    twin = core.native("twin").Twin
    traced: list[Any] = []
    trace = twin.peak_bytes

    def counted(self: Any, *args: Any) -> int:
        traced.append(args)
        return trace(self, *args)

    monkeypatch.setattr(twin, "peak_bytes", counted)
    patcher = make_patcher("wan-t2v")
    for usable_bytes, most in ((2**40, 1 + 2), (8_000_000, 5 + 2), (6_000_000, 3 + 2)):
        clone = fit_for(core, patcher, usable_bytes)
        sample(clone)
        chunked = plan_of(core, clone).workspace_bytes is not None
        assert chunked == (usable_bytes < 2**40)
        assert len(traced) <= most
        traced.clear()


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_calls_are_those_that_were_foreseen(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """One plan does for a run, made before weights are loaded."""
    planner = core.native("call_planner").CallPlanner
    planned: list[Any] = []
    plan = planner.plan

    def heard(self: Any, *args: Any) -> Any:
        planned.append(args)
        return plan(self, *args)

    monkeypatch.setattr(planner, "plan", heard)
    sample(fit_for(core, make_patcher(name), 2**40))
    assert len(planned) == 1
