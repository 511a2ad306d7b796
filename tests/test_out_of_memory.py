"""Out of memory anywhere: the stage falls back and continues from its last step, with the result of an undisturbed run.

Failures are injected at the layer calls of a real run, one kind after another.
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
from i2v_core.planning.plan import DecodeSettings, EncodeSettings, Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling import sysmem_fallback
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
# The messages of torch, CUDA itself, cuBLAS and CUDA's asynchronous allocator.
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
    """Wraps a runner and makes chosen calls fail."""

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
    """Return a function that makes layer calls of all stages fail with the errors that its argument returns."""

    def install(fails: Callable[[LayerCall], BaseException | None]) -> None:
        place = StageRun.place

        @contextmanager
        def placing(self: StageRun, component: str, *, by_layer: bool = False) -> Iterator[Placed]:
            with place(self, component, by_layer=by_layer) as placed:
                yield replace(placed, runner=Failing(placed.runner, fails))

        monkeypatch.setattr(StageRun, "place", placing)

    return install


def at(kind: str, *occurrences: int, error: str = "torch") -> Callable[[LayerCall], BaseException | None]:
    """Fail at the given occurrences of a kind of layer call, counted over all attempts."""
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
    chosen = with_settings(plan, sample=replace(plan.sample.settings, streamed=streamed))
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
            assert report.plan.prediction(Stage.SAMPLE).peak_bytes < chosen.prediction(Stage.SAMPLE).peak_bytes
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
    """Let the second failure come with the first layer of the next attempt, the third right after it."""
    fail(at("conv_in", 3, 4, 5))
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)
    assert torch.allclose(samples, expected, atol=2e-5)
    assert len(report.notes) == 3
    survived["out of memory during recovery"] += 3


def test_other_errors_are_not_retried(model: I2VModel, plan: Plan, conditioning: Conditioning, fail: Any) -> None:
    def fails(call: LayerCall) -> BaseException | None:
        return RuntimeError("shapes do not match")

    fail(fails)
    with pytest.raises(RuntimeError, match="shapes"):
        stages.sample(model, plan, conditioning, SETTINGS, RUNTIME)


def test_without_fallback_the_host_frees_memory_and_then_the_error_names_the_remedy(
    model: I2VModel, plan: Plan, conditioning: Conditioning, fail: Any
) -> None:
    requests: list[int] = []
    current, fallbacks = plan, 0
    while (lower := next_fallback(current, Stage.SAMPLE)) is not None:
        current, fallbacks = lower, fallbacks + 1
    fail(at("conv_in", *range(3, 10_000)))
    before = weights(model)
    runtime = replace(RUNTIME, make_room=lambda: requests.append(1), free_bytes=lambda: 3 * 1024**2)
    with pytest.raises(RanOutError, match=r"sample ran out .* at step 2 of 5.* needs .* 3.0 MiB are free") as raised:
        stages.sample(model, plan, conditioning, SETTINGS, runtime)
    assert "free device memory" in raised.value.remedy
    assert "frames" in raised.value.remedy
    assert raised.value.__context__ is None
    assert requests == [1]
    assert fallbacks >= 3
    assert weights(model) == before


def test_each_fallback_takes_less_and_none_comes_twice(plan: Plan) -> None:
    for stage in Stage:
        current, seen = plan, [plan.prediction(stage).peak_bytes]
        while (lower := next_fallback(current, stage)) is not None:
            current = lower
            seen.append(current.prediction(stage).peak_bytes)
        assert seen == sorted(set(seen), reverse=True)
        assert len(seen) > 3


def test_approximate_fallbacks_only_where_they_are_allowed(plan: Plan) -> None:
    """Leave no host memory to stream from: the last fallback is then weights in 8 bits."""
    plan = replace(plan, budget=replace(plan.budget, host_free_bytes=plan.prediction(Stage.SAMPLE).host_bytes))
    allowed = replace(plan, request=replace(plan.request, allow_approximate=True))

    def last(current: Plan) -> Plan:
        while (lower := next_fallback(current, Stage.SAMPLE)) is not None:
            current = lower
        return current

    assert last(plan).sample.settings.weight_storage is plan.sample.settings.weight_storage
    assert last(allowed).sample.settings.weight_storage is not plan.sample.settings.weight_storage
    assert last(allowed).prediction(Stage.SAMPLE).peak_bytes < last(plan).prediction(Stage.SAMPLE).peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_encode_and_decode_continue_too(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    streamed: bool,
    fail: Any,
    monkeypatch: pytest.MonkeyPatch,
    survived: Counter[str],
) -> None:
    """Inject one failure at every third of their layer calls."""
    tiles = TilingSettings(chunk_size=1, tile_pixels=64)
    encode = EncodeSettings(tiling=tiles, streamed=streamed)
    chosen = with_settings(plan, encode=encode, decode=DecodeSettings(tiling=tiles, streamed=streamed))
    samples = torch.randn(4, 4, 8, 9, generator=torch.Generator().manual_seed(5))
    frames = stages.decode(model, chosen, samples, RUNTIME)[0]
    for occurrence in range(1, 40, 3):
        monkeypatch.undo()
        fail(at("row_tile", occurrence))
        again, report = stages.decode(model, chosen, samples, RUNTIME)
        assert report.notes
        assert torch.allclose(again, frames, atol=1e-5)
        survived["out of memory in decode"] += 1
        monkeypatch.undo()
        fail(at("row_tile", occurrence))
        encoded, report = stages.encode(model, chosen, PROMPT, RUNTIME)
        for name, tensor in conditioning.positive.items():
            assert torch.allclose(encoded.positive[name], tensor, atol=1e-5), name
        survived["out of memory in encode"] += 1


def test_sysmem_fallback_costs_a_fallback_and_no_step(
    model: I2VModel, plan: Plan, conditioning: Conditioning, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on a clock whose fourth step takes ten times as long as the others."""
    clock, shown = 0.0, []

    def tick(step: int, *_: object) -> None:
        nonlocal clock
        shown.append(step)
        clock += 20.0 if step == 4 else 2.0

    monkeypatch.setattr(sysmem_fallback.time, "monotonic", lambda: clock)
    runtime = replace(RUNTIME, on_progress=tick, free_bytes=lambda: 0)
    samples, report = stages.sample(model, plan, conditioning, SETTINGS, runtime)
    assert torch.allclose(samples, expected, atol=2e-5)
    assert shown == [1, 2, 3, 4, 5]
    assert "step 4 took" in report.notes[0]
    assert "at step 4 of 5" in report.notes[1]
    assert report.plan.prediction(Stage.SAMPLE).peak_bytes < plan.prediction(Stage.SAMPLE).peak_bytes
