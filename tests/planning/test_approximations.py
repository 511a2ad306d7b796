"""Plans that give up some exactness: only where that is allowed and nothing exact fits, and they say so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from i2v_core.families import VideoSize, bundled_architecture
from i2v_core.families.i2vgen_xl import I2VGenXL
from i2v_core.memory.device import DeviceFacts
from i2v_core.placement import storage
from i2v_core.placement.storage import WeightStorage
from i2v_core.planning.approximations import Approximation, approximations
from i2v_core.planning.plan import SampleSettings
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import predict_sample
from i2v_core.planning.report import plan_as_dict, plan_reasons, report
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.suggestions import NothingFitsError
from i2v_core.sampling.context import ContextWindows
from i2v_core.units import GIB, MIB

CARD = DeviceFacts(device="cuda", name="a card", precisions=(torch.bfloat16, torch.float32))
SIZE = VideoSize(width_pixels=512, height_pixels=512, frames=16)
EXACT = Request(architecture=bundled_architecture("i2vgen-xl"), size=SIZE, precision="fp16")
ALLOWED = replace(EXACT, allow_approximate=True)
# The exact weights take 2.65 GiB, in place or again in host memory to stream from.
SHORT = Budget(free_bytes=2 * GIB, host_free_bytes=GIB)


def without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "find_spec", lambda _: None)


@pytest.mark.parametrize("free_gib", [2.0, 3.0, 6.0, 16.0])
def test_what_fits_exactly_is_planned_exactly(free_gib: float) -> None:
    budget = Budget(free_bytes=int(free_gib * GIB))
    exact, allowed = make_plan(EXACT, budget, CARD), make_plan(ALLOWED, budget, CARD)
    assert plan_as_dict(allowed) == plan_as_dict(exact)
    assert allowed.stages == exact.stages


@pytest.mark.slow
def test_any_exact_precision_comes_before_8_bits() -> None:
    """Here bf16 fits in no way, and fp32 in none either; with a little more memory bf16 does."""
    auto = replace(ALLOWED, precision="auto")
    assert make_plan(auto, SHORT, CARD).sample.settings.weight_storage is not WeightStorage.AS_COMPUTED
    enough = replace(SHORT, free_bytes=int(3.2 * GIB))
    assert make_plan(auto, enough, CARD).sample.settings.weight_storage is WeightStorage.AS_COMPUTED


def test_int8_changes_less_and_comes_first_where_torchao_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "find_spec", lambda name: name == "torchao")
    assert make_plan(ALLOWED, SHORT, CARD).sample.settings.weight_storage is WeightStorage.INT8
    without_torchao(monkeypatch)
    assert make_plan(ALLOWED, SHORT, CARD).sample.settings.weight_storage is WeightStorage.FP8


def test_the_report_says_what_was_given_up_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchao(monkeypatch)
    plan = make_plan(ALLOWED, SHORT, CARD)
    assert plan_as_dict(plan)["weight_storage"] == "fp8"
    reason = next(reason for reason in plan_reasons(plan) if "fp8" in reason)
    assert "no exact settings fit" in reason
    assert "close to, but not exactly" in reason
    assert reason in report(plan)


def test_a_refusal_names_it_and_it_then_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torchao(monkeypatch)
    with pytest.raises(NothingFitsError) as raised:
        make_plan(EXACT, SHORT, CARD)
    assert raised.value.suggestions.as_dict()["approximation"] == "fp8 weights"
    assert "allow approximate plans (fp8 weights)" in raised.value.remedy
    make_plan(ALLOWED, SHORT, CARD)


# A clip whose skip connections outweigh all else, on a card with room for some of them.
LONG = replace(ALLOWED, size=replace(SIZE, frames=128))
LITTLE = Budget(free_bytes=int(0.6 * GIB))


def test_windows_come_after_8_bits_and_as_long_as_fit() -> None:
    plan = make_plan(LONG, LITTLE, CARD)
    assert plan.sample.settings.context == ContextWindows(context_length=64, context_overlap=16)
    assert plan.sample.settings.weight_storage is WeightStorage.AS_COMPUTED
    lengths = [it.context.context_length if it.context else None for it in approximations(LONG)]
    assert lengths == sorted(lengths, key=lambda length: -(length or 1000))
    assert list(dict.fromkeys(lengths)) == [None, 64, 32, 16, 8]
    assert lengths.count(None) == lengths.count(8)
    shorter = make_plan(LONG, replace(LITTLE, free_bytes=int(0.45 * GIB)), CARD)
    assert shorter.sample.settings.context is not None
    assert shorter.sample.settings.context.context_length < 64


def test_windows_are_named_in_report_and_refusal() -> None:
    plan = make_plan(LONG, LITTLE, CARD)
    assert plan_as_dict(plan)["context_length"] == 64
    assert plan_as_dict(plan)["context_overlap"] == 16
    reason = next(reason for reason in plan_reasons(plan) if "64 latent frames" in reason)
    assert "no exact settings fit" in reason
    assert "close to, but not exactly" in reason
    with pytest.raises(NothingFitsError, match="context windows of 64 frames"):
        make_plan(replace(LONG, allow_approximate=False), LITTLE, CARD)


@pytest.mark.parametrize(("frames", "lengths"), [(8, []), (9, [8]), (16, [8]), (24, [16, 12, 8]), (33, [16, 8])])
def test_windows_are_shorter_than_the_clip(frames: int, lengths: list[int]) -> None:
    found = {it.context for it in approximations(replace(ALLOWED, size=replace(SIZE, frames=frames)))} - {None}
    assert sorted((context.context_length for context in found if context), reverse=True) == lengths


def test_a_family_whose_denoiser_must_see_the_whole_clip_has_no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole_clip = replace(I2VGenXL.facts, anchor_frames=None)
    monkeypatch.setattr(I2VGenXL, "facts", whole_clip)
    assert not any(it.context for it in approximations(LONG))
    context = ContextWindows(context_length=16, context_overlap=4)
    settings = SampleSettings(compute_dtype=torch.float16, batched_guidance=False, workspace_bytes=128 * MIB)
    assert predict_sample(ALLOWED, replace(settings, context=context)) == predict_sample(ALLOWED, settings)


@pytest.mark.parametrize("request_", [ALLOWED, EXACT], ids=["allowed", "not allowed"])
def test_a_refusal_does_not_name_what_would_not_help(request_: Request) -> None:
    with pytest.raises(NothingFitsError) as raised:
        make_plan(request_, replace(SHORT, free_bytes=256 * MIB), CARD)
    assert raised.value.suggestions.approximation is None
    assert "approximate" not in raised.value.remedy


@pytest.mark.parametrize("kind", [WeightStorage.INT8, WeightStorage.FP8])
def test_the_published_models_weights_take_half(kind: WeightStorage) -> None:
    settings = SampleSettings(compute_dtype=torch.float16, batched_guidance=False, workspace_bytes=128 * MIB)

    def predicted(**changes: object) -> tuple[int, int]:
        prediction = predict_sample(EXACT, replace(settings, **changes))  # type: ignore[arg-type]
        return prediction.peak_bytes, prediction.host_bytes

    exact_bytes, _ = predicted()
    assert predicted(weight_storage=kind)[0] < exact_bytes - 1.2 * GIB
    streamed_bytes, exact_host_bytes = predicted(streamed=True)
    small_bytes, small_host_bytes = predicted(streamed=True, weight_storage=kind)
    assert small_bytes < streamed_bytes
    assert 0.5 * exact_host_bytes < small_host_bytes < 0.51 * exact_host_bytes


def test_an_approximation_is_known_by_its_settings() -> None:
    settings = SampleSettings(compute_dtype=torch.float16, batched_guidance=True)
    for approximation in approximations(ALLOWED):
        assert Approximation.of(approximation.applied_to(settings)) == approximation
    assert [str(it) for it in approximations(EXACT)] == [""]
