"""The report of a run, what later runs learn from it, and memory that the driver has spilled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .conftest import Core
from .test_fit import fit_for, plan_of

pytestmark = pytest.mark.host


def plan(core: Core, peak_bytes: int, **fields: Any) -> Any:
    """A plan in a budget of 8 GiB without weights."""
    chosen = {"workspace_bytes": 2**28, "stock_bytes": 3 * peak_bytes, "usable_bytes": 2**33, "weights_bytes": 0}
    return core.native("call_plan").CallPlan(peak_bytes=peak_bytes, **{**chosen, **fields})


def test_a_report_shows_prediction_measurement_and_what_core_would_take(core: Core) -> None:
    record = core.native("run_record").RunRecord(lambda: None)
    chosen = plan(core, 2**30)
    assert "predicted 1.00 GiB ± 30.7 MiB of activations a call, core's own 3.00 GiB" in record.text(chosen)
    assert record.report((1, 16, 5, 8, 8)) is None, "nothing was measured"


def test_what_runs_took_corrects_later_plans_and_no_plan_lies_below_it(core: Core, tmp_path: Path) -> None:
    """The pack's own calibration: the worst ratio of the last runs of the same model, attention, host and card."""
    from dataclasses import replace

    store = core.library("memory.calibration").CalibrationStore(tmp_path / "calibration.json")
    facts = core.native("call_plan").UNKNOWN_DEVICE
    for measured_bytes in (1000, 1300, 900):
        store.record("a model", "sample", predicted_bytes=1000, measured_bytes=measured_bytes)
    taught = replace(facts, calibration=store.calibration("a model"))
    assert plan(core, 1000).needed_bytes == 1030
    assert plan(core, 1000, device=taught).expected_bytes == 1300
    assert plan(core, 1000, device=taught).needed_bytes >= 1300
    assert plan(core, 2000, device=taught).expected_bytes == 2600


def test_a_run_learns_under_its_class_precision_and_attention(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    asked: list[str] = []

    def facts(model: str) -> Any:
        asked.append(model)
        return core.native("call_plan").UNKNOWN_DEVICE

    patcher = make_patcher("wan-t2v")
    sample(fit_for(core, patcher, 2**40, device_facts=facts))
    other = patcher.clone()

    def sage_override(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    other.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = sage_override
    sample(fit_for(core, other, 2**40, device_facts=facts))
    own, replaced = (asked[0], asked[-1])
    assert own.startswith("WanModel, torch.float32, attention_")
    assert replaced == "WanModel, torch.float32, sage_override"


def test_spilled_memory_is_reported_and_later_calls_take_less(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step that takes many times as long as the others, while the device has nothing free."""
    detector = core.library("sampling.sysmem_fallback")
    seconds = iter([0, 1, 2, 3, 4, 24, 25, 26, 27])
    monkeypatch.setattr(detector.time, "monotonic", lambda: float(next(seconds)))
    said: list[str] = []
    patcher = make_patcher("wan-t2v")
    expected = sample(patcher, steps=7)
    seconds = iter([0, 1, 2, 3, 4, 24, 25, 26, 27])
    workspaces: list[int | None] = []
    clone = fit_for(core, patcher, 2**40, say=said.append, free_bytes=lambda: 0)

    state = clone.get_attachment(core.native("fit").KEY).state

    def heard(_block: Any, given: Any) -> None:
        if not given[0].is_meta:  # a twin's blocks are heard too
            workspaces.append(state.workspace_bytes)

    handle = patcher.model.diffusion_model.blocks[0].register_forward_pre_hook(heard)
    result = sample(clone, steps=7)
    handle.remove()
    assert float((result - expected).abs().max()) <= 1e-5
    warnings = [line for line in said if "host memory" in line]
    assert len(warnings) == 2, "when it happens, and in the report"
    assert workspaces[0] is None
    assert workspaces[-1] is not None
    assert plan_of(core, clone) is not None


def test_the_memory_report_finds_the_run_of_a_latent(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the prompt that runs; for a latent that was cached, the last of its shape."""
    import importlib

    runs = importlib.import_module("i2v_native_tests.nodes.native_runs")
    monkeypatch.setattr(runs, "_runs", {})
    prompt = ["first"]
    monkeypatch.setattr(runs, "_running_prompt", lambda: prompt[0])
    high, low, other = (
        {"latent_shape": [1, 16, 5, 8, width], "name": name} for width, name in ((8, 1), (8, 2), (9, 3))
    )
    latent = {"samples": torch.zeros(1, 16, 5, 8, 8)}
    assert runs.of(latent) == ()
    runs.keep(high)
    runs.keep(low)
    assert runs.of(latent) == (high, low)
    prompt[0] = "second"
    runs.keep(other)
    prompt[0] = "third"
    assert runs.of(latent) == (high, low)
    assert runs.of(None) == ()
    for index in range(20):
        prompt[0] = str(index)
        runs.keep(other)
    assert runs.of(latent) == (other,), "of the prompt that runs"
    assert len(runs._runs) == 8


def test_steps_without_a_call_are_not_held_against_others(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other nodes skip steps, and a run that is resumed has steps that are answered from disk."""
    clock = 0.0
    monkeypatch.setattr(core.library("sampling.sysmem_fallback").time, "monotonic", lambda: clock)
    record = core.native("run_record").RunRecord(lambda: 0)
    warnings: list[str | None] = []
    for seconds in (0.01, 0.01, 0.01, 0.01, 2.0, 2.0, 2.0, 14.0):
        warnings.append(record.begin_step())
        if seconds > 1:
            with record.call("shape", plan(core, 2**30), torch.device("cpu")):
                clock += seconds
        clock += 0.01
    warnings.append(record.begin_step())
    assert not any(warnings[:-1])
    assert warnings[-1] is not None
    assert "took 14.0 s" in warnings[-1]
