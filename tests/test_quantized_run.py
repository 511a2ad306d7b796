"""Wan from GGUF and fp8 files, through all stages: equal to diffusers' own GGUF model, within the predicted memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.chunking import ChunkSettings
from i2v_core.errors import DoesNotFitError
from i2v_core.families import I2VModel, Prompt, VideoSize, family_of, load_model
from i2v_core.memory.device import device_facts
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.placement.placed import placed
from i2v_core.placement.precision import PRECISIONS
from i2v_core.placement.quantized import quantized_weights
from i2v_core.planning.approximations import approximations
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import predict_sample, with_settings
from i2v_core.planning.report import plan_as_dict, report
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.search import min_peak
from i2v_core.planning.trace import trace_denoiser
from i2v_core.units import GIB, KIB
from tests.emulated_cuda import CARD, emulated_cuda
from tests.wan_files import (
    QuantizationType,
    read_by_diffusers,
    save_wan_of_blocks,
    tiny_transformer,
    write_fp8,
    write_gguf,
)

CPU = device_facts(torch.device("cpu"))
RUNTIME = stages.Runtime(device=torch.device("cpu"))
SIZE = VideoSize(width_pixels=96, height_pixels=64, frames=9)
PROMPT = Prompt(image_FHWC=torch.rand(1, 70, 90, 3, generator=torch.Generator().manual_seed(0)), text="a red circle")
SAMPLER = stages.SamplerSettings(steps=3, cfg=4.0, seed=1, scheduler="unipc")
VECTORS_BYTES = 8 * KIB
"""Allowance for what predictions leave out: scales and shifts per channel, attention's values per token."""
Q5_0, F32 = QuantizationType.Q5_0, QuantizationType.F32

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """A small Wan 2.1 with its transformer from a file, and that file."""

    model: I2VModel
    file: Path


@pytest.fixture(scope="module", params=["gguf", "fp8"])
def wan(
    request: pytest.FixtureRequest, save_wan: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Quantised:
    folder = tmp_path_factory.mktemp("wan")
    weights = save_wan_of_blocks(save_wan, folder)["transformer"].state_dict()
    if request.param == "gguf":
        file = write_gguf(folder / "wan-Q4_0.gguf", weights)
    else:
        file = write_fp8(folder / "wan_fp8_scaled.safetensors", weights, scaled=True)
    return Quantised(model=load_model(folder, {"transformer": file}), file=file)


def plain_transformer(wan: Quantised, dtype: torch.dtype) -> Any:
    """Load the file as other programs do: with diffusers' own GGUF model, or dequantized to floats."""
    if wan.file.suffix == ".gguf":
        return read_by_diffusers(wan.file, wan.model.folder, dtype)
    ours = wan.model.modules["transformer"]
    forms = quantized_weights(ours)
    from diffusers import WanTransformer3DModel

    untyped: Any = WanTransformer3DModel
    plain = untyped.from_config(wan.model.architecture.config("transformer")).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            mine = ours.get_parameter(name)
            parameter.copy_(forms[mine].dequantized(mine.data, dtype) if mine in forms else mine)
    return plain


def planned(wan: Quantised, precision: str) -> Plan:
    request = Request(architecture=wan.model.architecture, size=SIZE, precision=precision)
    return make_plan(request, Budget(free_bytes=GIB), CPU)


def changed(plan: Plan, **settings: Any) -> Plan:
    return with_settings(plan, sample=replace(plan.sample.settings, **settings))


def prediction_of(wan: Quantised, transformer: Any, precision: str, settings: ChunkSettings | None) -> Tensor:
    """Run one pass on fixed random inputs: with the transformer's own forward, or chunked with streamed weights."""
    from i2v_core.placement.streaming import streamed

    family, dtype = family_of(wan.model.architecture), PRECISIONS[precision]
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    latents = random(*family.facts.latent_size(SIZE).shape_bcthw)
    inputs = {
        "encoder_hidden_states": random(1, 512, 32),
        "encoder_hidden_states_image": random(1, 17, 32),
        "condition": random(1, 20, *latents.shape[2:]),
    }
    denoise = partial(family.denoise, transformer, latents, torch.tensor(500.0), inputs)
    with torch.no_grad():
        if settings is None:
            return denoise()
        with (
            streamed(transformer, torch.device("cpu"), dtype) as stream,
            family.chunked(transformer, settings, runner=stream, on_chunk=lambda: None),
        ):
            return denoise()


@pytest.mark.parametrize(("precision", "most"), [("fp32", 2e-6), ("bf16", 2e-2)])
def test_chunks_with_streamed_weights_equal_the_plain_forward(wan: Quantised, precision: str, most: float) -> None:
    plain = plain_transformer(wan, PRECISIONS[precision])
    if wan.file.suffix == ".gguf":
        expected = prediction_of(wan, plain, precision, None)
    else:
        with placed(plain, torch.device("cpu"), PRECISIONS[precision]):
            expected = prediction_of(wan, plain, precision, None)
    transformer = wan.model.modules["transformer"]
    before = {name: tensor.data_ptr() for name, tensor in transformer.named_parameters()}
    ours = prediction_of(wan, transformer, precision, ChunkSettings(workspace_bytes=64 * KIB))
    assert ((ours - expected).float().norm() / expected.float().norm()).item() <= most
    assert {name: tensor.data_ptr() for name, tensor in transformer.named_parameters()} == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_way_to_place_quantised_weights_gives_the_same_video(wan: Quantised, precision: str) -> None:
    plan = planned(wan, precision)
    conditioning, _ = stages.encode(wan.model, plan, PROMPT, RUNTIME)
    results: list[Tensor] = []
    for streamed in (False, True):
        way = changed(plan, streamed=streamed, workspace_bytes=64 * KIB)
        results.append(stages.sample(wan.model, way, conditioning, SAMPLER, RUNTIME)[0])
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("workspace_bytes", [None, 64 * KIB])
def test_sampling_takes_what_is_predicted(wan: Quantised, streamed: bool, workspace_bytes: int | None) -> None:
    plan = changed(planned(wan, "bf16"), streamed=streamed, workspace_bytes=workspace_bytes)
    conditioning, _ = stages.encode(wan.model, plan, PROMPT, RUNTIME)
    _, sampled = stages.sample(wan.model, plan, conditioning, SAMPLER, RUNTIME)
    predicted_bytes = plan.prediction(Stage.SAMPLE).peak_bytes
    measured_bytes = sampled.measured_peak_bytes
    assert measured_bytes - VECTORS_BYTES <= predicted_bytes <= 1.08 * measured_bytes


@pytest.mark.parametrize("streamed", [False, True])
def test_memory_of_dequantizing_is_predicted(save_wan: Callable[..., None], tmp_path: Path, streamed: bool) -> None:
    """Use layers so wide that dequantizing a weight takes more memory than the layer does with so few tokens."""
    save_wan_of_blocks(save_wan, tmp_path)
    wide = tiny_transformer(num_attention_heads=8, added_kv_proj_dim=256, ffn_dim=2048)
    wide.save_config(tmp_path / "transformer")
    file = write_gguf(tmp_path / "wide.gguf", wide.state_dict(), lambda _, it: Q5_0 if it.ndim == 2 else F32)
    model = load_model(tmp_path, {"transformer": file})
    size = replace(SIZE, frames=1)
    request = Request(architecture=model.architecture, size=size, precision="bf16", guidance=False)
    plan = make_plan(request, Budget(free_bytes=GIB), CPU)
    plan = changed(plan, streamed=streamed, workspace_bytes=1)
    conditioning, _ = stages.encode(model, plan, PROMPT, RUNTIME)
    _, sampled = stages.sample(model, plan, conditioning, replace(SAMPLER, cfg=1.0), RUNTIME)
    predicted, measured_bytes = plan.prediction(Stage.SAMPLE), sampled.measured_peak_bytes
    assert measured_bytes - VECTORS_BYTES <= predicted.peak_bytes <= 1.02 * measured_bytes
    scratch_bytes = max(form.dequantizing_bytes for form in quantized_weights(model.modules["transformer"]).values())
    assert scratch_bytes > 0.2 * predicted.peak_bytes


def test_experts_from_two_files_take_turns_within_the_prediction(save_wan: Callable[..., None], tmp_path: Path) -> None:
    """Store one in 4 bits, the other in fp8: the prediction is that of the larger."""
    folder = tmp_path / "a14b"
    experts = save_wan_of_blocks(save_wan, folder, layout="wan2.2-a14b")
    files = {
        "transformer": write_gguf(tmp_path / "high.gguf", experts["transformer"].state_dict()),
        "transformer_2": write_fp8(tmp_path / "low.safetensors", experts["transformer_2"].state_dict(), scaled=True),
    }
    model = load_model(folder, files)
    request = Request(architecture=model.architecture, size=SIZE, precision="bf16")
    plan = changed(make_plan(request, Budget(free_bytes=GIB), CPU), streamed=False, workspace_bytes=64 * KIB)
    conditioning, _ = stages.encode(model, plan, PROMPT, RUNTIME)
    samples, sampled = stages.sample(model, plan, conditioning, SAMPLER, RUNTIME)
    assert torch.isfinite(samples).all()
    predicted_bytes = plan.prediction(Stage.SAMPLE).peak_bytes
    assert sampled.measured_peak_bytes - VECTORS_BYTES <= predicted_bytes <= 1.08 * sampled.measured_peak_bytes
    only_low = model.architecture.with_stored({**model.architecture.stored, "transformer": {}})
    as_floats = replace(request, architecture=only_low)
    assert predict_sample(as_floats, plan.sample.settings).peak_bytes > predicted_bytes


def test_the_lowest_memory_plan_runs_on_a_card_of_its_size(wan: Quantised, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(architecture=wan.model.architecture, size=SIZE, precision="bf16")
    usable_bytes = needed_bytes(min_peak(request, CPU), CPU)
    plan = make_plan(request, Budget(free_bytes=usable_bytes), CPU)
    monkeypatch.setattr("i2v_core.stages.run.stage_meter", partial(stage_meter, limit_bytes=usable_bytes))
    conditioning, encoded = stages.encode(wan.model, plan, PROMPT, RUNTIME)
    samples, sampled = stages.sample(wan.model, plan, conditioning, SAMPLER, RUNTIME)
    frames, decoded = stages.decode(wan.model, plan, samples, RUNTIME)
    assert frames.shape == (9, 64, 96, 3)
    for it in (encoded, sampled, decoded):
        assert it.measured_peak_bytes <= usable_bytes
        assert not it.failed
    with pytest.raises(DoesNotFitError):
        make_plan(request, Budget(free_bytes=usable_bytes // 2), CPU)


def test_the_report_says_that_the_weights_are_approximate(wan: Quantised) -> None:
    plan = planned(wan, "bf16")
    (formats,) = {", ".join(wan.model.architecture.stored_formats)}
    assert f"{formats} weights: approximate" in report(plan)
    assert plan_as_dict(plan)["file_formats"] == list(wan.model.architecture.stored_formats)


def test_no_plan_reduces_them_further(wan: Quantised) -> None:
    request = Request(architecture=wan.model.architecture, size=SIZE, allow_approximate=True)
    assert [str(way) for way in approximations(request)] == [""]


def test_weights_take_less_than_as_floats_in_every_way(wan: Quantised) -> None:
    request = planned(wan, "bf16").request
    exact = replace(request, architecture=request.architecture.with_stored({}))
    plan = planned(wan, "bf16")
    for streamed in (False, True):
        settings = replace(plan.sample.settings, streamed=streamed, workspace_bytes=64 * KIB)
        quantised, floats = predict_sample(request, settings), predict_sample(exact, settings)
        assert quantised.peak_bytes < floats.peak_bytes or streamed
        if streamed:
            assert quantised.host_bytes < 0.75 * floats.host_bytes


def test_layers_say_where_their_weights_are(wan: Quantised) -> None:
    """Check that every quantised weight is in some layer call: no layer gets it as bytes."""
    trace = trace_denoiser(wan.model.architecture, SIZE, 1, torch.bfloat16, ChunkSettings(workspace_bytes=64 * KIB))
    met = {weight for call in trace.calls for module in call.modules for weight in quantized_weights(module)}
    assert met == set(quantized_weights(trace.module))


@pytest.mark.parametrize("streamed", [False, True])
def test_on_a_card_the_result_is_the_cpus(wan: Quantised, streamed: bool) -> None:
    """Dequantize on the card: nothing mixes devices, and no copy is used before it ends."""
    plan = changed(planned(wan, "bf16"), streamed=streamed, workspace_bytes=50_000)
    conditioning, _ = stages.encode(wan.model, plan, PROMPT, RUNTIME)
    expected, counted = stages.sample(wan.model, plan, conditioning, SAMPLER, RUNTIME)
    with emulated_cuda() as card:
        found, report = stages.sample(wan.model, plan, conditioning, SAMPLER, stages.Runtime(device=CARD))
    assert torch.equal(found, expected)
    assert report.measured_peak_bytes == pytest.approx(counted.measured_peak_bytes, rel=0.02)
    assert not card.races, card.races[0]
