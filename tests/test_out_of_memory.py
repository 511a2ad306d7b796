"""Out of memory anywhere: the stage goes on from where it was, a rung lower, and the result is the undisturbed run's.

Failures are put in at the layer calls of a real run, one kind after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.chunking import LayerCall, LayerRunner
from i2v_core.decoding import TilingSettings
from i2v_core.errors import RanOutError
from i2v_core.families import Conditioning, I2VModel, Placed, Prompt, VideoSize, load_model
from i2v_core.memory.device import device_facts
from i2v_core.planning.fallback import next_fallback
from i2v_core.planning.plan import DecodeSettings, Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import predict_decode, predict_sample
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling import spill
from i2v_core.stages.run import StageRun
from i2v_core.units import GIB

CPU = torch.device("cpu")
RUNTIME = stages.Runtime(device=CPU)
STEPS = 5
SETTINGS = stages.SamplerSettings(steps=STEPS, cfg=4.0, seed=2, scheduler="unipc")
PROMPT = Prompt(
    image_FHWC=torch.rand(1, 70, 90, 3, generator=torch.Generator().manual_seed(0)),
    text="a red circle",
    negative_text="blue",
    fps=8,
)
# As torch, CUDA itself, cuBLAS and CUDA's asynchronous allocator say it.
ERRORS: dict[str, Callable[[], BaseException]] = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda": lambda: torch.AcceleratorError("CUDA error: out of memory"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "async": lambda: RuntimeError("Allocation on device"),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def plan(model: I2VModel) -> Plan:
    size = VideoSize(width_pixels=72, height_pixels=64, frames=4)
    request = Request(architecture=model.architecture, size=size, precision="fp32")
    return make_plan(request, Budget(free_bytes=GIB), device_facts(CPU))


@pytest.fixture(scope="module")
def conditioning(model: I2VModel, plan: Plan) -> Conditioning:
    return stages.encode(model, plan, PROMPT, RUNTIME)[0]


@pytest.fixture(scope="module")
def expected(model: I2VModel, plan: Plan, conditioning: Conditioning) -> Tensor:
    return stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)[0]


def weights(model: I2VModel) -> list[int]:
    return [it.data_ptr() for module in model.modules.values() for it in module.state_dict().values()]


class Failing(LayerRunner):
    """A runner around another whose calls fail when it is told so."""

    def __init__(self, inner: LayerRunner, fails: Callable[[LayerCall], BaseException | None]) -> None:
        self._inner, self._fails = inner, fails

    @contextmanager
    def enter(self, call: LayerCall) -> Iterator[None]:
        with self._inner.enter(call):
            error = self._fails(call)
            if error is not None:
                raise error
            yield


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[LayerCall], BaseException | None]], None]:
    """From its call on, layer calls of all stages fail where the given function says so."""

    def install(fails: Callable[[LayerCall], BaseException | None]) -> None:
        place = StageRun.place

        @contextmanager
        def placing(self: StageRun, component: str, *, by_layer: bool = False) -> Iterator[Placed]:
            with place(self, component, by_layer=by_layer) as placed:
                yield replace(placed, runner=Failing(placed.runner, fails))

        monkeypatch.setattr(StageRun, "place", placing)

    return install


def at(kind: str, *occurrences: int, error: str = "torch") -> Callable[[LayerCall], BaseException | None]:
    """Fails at the given occurrences of a kind of layer call, counted over all attempts."""
    count = 0

    def fails(call: LayerCall) -> BaseException | None:
        nonlocal count
        if call.kind != kind:
            return None
        count += 1
        return ERRORS[error]() if count in occurrences else None

    return fails


def kinds_of_calls(model: I2VModel, plan: Plan, conditioning: Conditioning, install: Any) -> list[str]:
    seen: list[str] = []
    install(lambda call: seen.append(call.kind))
    stages.sample(model, plan, conditioning, replace(SETTINGS, steps=1), RUNTIME)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_a_failure_at_every_kind_of_layer_in_the_first_a_middle_and_the_last_step(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    streamed: bool,
    monkeypatch: pytest.MonkeyPatch,
    fail: Any,
    survived: Counter[str],
) -> None:
    settings = replace(plan.sample, streamed=streamed)
    prediction = predict_sample(plan.request, settings)
    chosen = replace(plan, sample=settings, predictions=(plan.predictions[0], prediction, plan.predictions[2]))
    kinds = kinds_of_calls(model, chosen, conditioning, fail)
    monkeypatch.undo()
    short = replace(SETTINGS, steps=3)
    expected = stages.sample(model, plan, conditioning, short, RUNTIME)[0]
    before = weights(model)
    for kind in dict.fromkeys(kinds):
        for step in (1, 2, 3):
            monkeypatch.undo()
            fail(at(kind, (step - 1) * kinds.count(kind) + 1))
            shown: list[int] = []
            runtime = replace(RUNTIME, on_progress=lambda done, *_, shown=shown: shown.append(done))
            samples, report = stages.sample(model, chosen, conditioning, short, runtime)
            assert torch.allclose(samples, expected, atol=2e-5), (kind, step)
            assert shown == [1, 2, 3]  # no step was taken twice
            assert f"at step {step - 1} of 3" in report.notes[0]
            assert report.plan.prediction(Stage.SAMPLE).peak_bytes < prediction.peak_bytes
            assert weights(model) == before
            survived["out of memory in a layer"] += 1


@pytest.mark.parametrize("error", ERRORS)
def test_every_kind_of_error_counts(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    expected: Tensor,
    error: str,
    fail: Any,
    survived: Counter[str],
) -> None:
    fail(at("resnet", 5, error=error))
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    assert torch.allclose(samples, expected, atol=2e-5)
    assert len(report.notes) == 1
    survived["kinds of error"] += 1


def test_failures_in_a_row_and_during_recovery(
    model: I2VModel, plan: Plan, conditioning: Conditioning, expected: Tensor, fail: Any, survived: Counter[str]
) -> None:
    """The second comes with the first layer of the next attempt, the third right after that."""
    fail(at("conv_in", 3, 4, 5))
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    assert torch.allclose(samples, expected, atol=2e-5)
    assert len(report.notes) == 3
    survived["out of memory during recovery"] += 3


def test_what_is_no_lack_of_memory_is_not_tried_again(
    model: I2VModel, plan: Plan, conditioning: Conditioning, fail: Any
) -> None:
    def fails(call: LayerCall) -> BaseException | None:
        return RuntimeError("shapes do not match")

    fail(fails)
    with pytest.raises(RuntimeError, match="shapes"):
        stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)


def test_when_no_rung_is_left_the_host_makes_room_and_then_all_is_said(
    model: I2VModel, plan: Plan, conditioning: Conditioning, fail: Any
) -> None:
    rooms: list[int] = []
    rung, rungs = plan, 0
    while (lower := next_fallback(rung, Stage.SAMPLE)) is not None:
        rung, rungs = lower, rungs + 1
    fail(at("conv_in", *range(3, 10_000)))
    before = weights(model)
    runtime = replace(RUNTIME, make_room=lambda: rooms.append(1), free_bytes=lambda: 3 * 1024**2)
    with pytest.raises(RanOutError, match=r"sample ran out .* at step 2 of 5.* needs .* 3.0 MiB are free") as raised:
        stages.sample(model, plan, conditioning, SETTINGS, runtime)
    assert "free device memory" in raised.value.remedy
    assert "frames" in raised.value.remedy
    assert raised.value.__context__ is None
    assert rooms == [1]
    assert rungs >= 3
    assert weights(model) == before


def test_each_rung_takes_less_and_none_comes_twice(plan: Plan) -> None:
    for stage in Stage:
        rung, seen = plan, [plan.prediction(stage).peak_bytes]
        while (lower := next_fallback(rung, stage)) is not None:
            rung = lower
            seen.append(rung.prediction(stage).peak_bytes)
        assert seen == sorted(set(seen), reverse=True)
        assert len(seen) > 3


def test_approximate_rungs_only_where_they_are_allowed(plan: Plan) -> None:
    """Without host memory to stream from, weights in 8 bits are what is left."""
    plan = replace(plan, budget=replace(plan.budget, host_free_bytes=plan.prediction(Stage.SAMPLE).host_bytes))
    allowed = replace(plan, request=replace(plan.request, allow_approximate=True))

    def last(rung: Plan) -> Plan:
        while (lower := next_fallback(rung, Stage.SAMPLE)) is not None:
            rung = lower
        return rung

    assert last(plan).sample.weight_storage is plan.sample.weight_storage
    assert last(allowed).sample.weight_storage is not plan.sample.weight_storage
    assert last(allowed).prediction(Stage.SAMPLE).peak_bytes < last(plan).prediction(Stage.SAMPLE).peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_encode_and_decode_go_on_too(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    streamed: bool,
    fail: Any,
    monkeypatch: pytest.MonkeyPatch,
    survived: Counter[str],
) -> None:
    """At each of their layer calls, once."""
    tiles = TilingSettings(chunk_size=1, tile_pixels=64)
    encode = replace(plan.encode, picture=tiles, streamed=streamed)
    decode = DecodeSettings(frames=tiles, streamed=streamed)
    prediction = predict_decode(plan.request, decode, torch.float32)
    chosen = replace(plan, encode=encode, decode=decode, predictions=(*plan.predictions[:2], prediction))
    samples = torch.randn(4, 4, 8, 9, generator=torch.Generator().manual_seed(5))
    frames = stages.decode(model, chosen, samples, RUNTIME)[0]
    for occurrence in range(1, 40, 3):
        monkeypatch.undo()
        fail(at("band", occurrence))
        again, report = stages.decode(model, chosen, samples, RUNTIME)
        assert report.notes
        assert torch.allclose(again, frames, atol=1e-5)
        survived["out of memory in decode"] += 1
        monkeypatch.undo()
        fail(at("band", occurrence))
        told, report = stages.encode(model, chosen, PROMPT, RUNTIME)
        for name, tensor in conditioning.positive.items():
            assert torch.allclose(told.positive[name], tensor, atol=1e-5), name
        survived["out of memory in encode"] += 1


def test_a_spill_into_host_memory_costs_a_rung_and_no_step(
    model: I2VModel, plan: Plan, conditioning: Conditioning, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock on which the fourth step takes ten times as long as the others."""
    clock, shown = 0.0, []

    def tick(step: int, *_: object) -> None:
        nonlocal clock
        shown.append(step)
        clock += 20.0 if step == 4 else 2.0

    monkeypatch.setattr(spill.time, "monotonic", lambda: clock)
    runtime = replace(RUNTIME, on_progress=tick, free_bytes=lambda: 0)
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, runtime)
    assert torch.allclose(samples, expected, atol=2e-5)
    assert shown == [1, 2, 3, 4, 5]
    assert "step 4 took" in report.notes[0]
    assert "at step 4 of 5" in report.notes[1]
    assert report.plan.prediction(Stage.SAMPLE).peak_bytes < plan.prediction(Stage.SAMPLE).peak_bytes
