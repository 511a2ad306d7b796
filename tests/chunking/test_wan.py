"""The Wan transformer in pieces gives the plain forward's result, whatever the layout, the pieces and the precision."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from i2v_core.chunking import ChunkSettings, DistinctPieces, LayerCall, LayerRunner, Outline
from i2v_core.chunking.wan import chunked_wan
from i2v_core.memory.meter import StorageMeter, fused_attention
from i2v_core.units import GIB, MIB

EVERYTHING = 2**40
SMALLEST = 1
TEXT_WIDTH = 32
PICTURE_WIDTH = 40
VECTORS_BYTES = 64 * 1024
"""For what estimates leave out: numbers of one a token, or a channel."""

PICTURE_IN_CONTEXT: dict[str, Any] = {"image_dim": PICTURE_WIDTH, "added_kv_proj_dim": 48}  # Wan 2.1
PICTURE_IN_LATENTS: dict[str, Any] = {}  # Wan 2.2, two experts
TIME_OF_TOKENS: dict[str, Any] = {"in_channels": 16}  # Wan 2.2 TI2V
LAYOUTS = [PICTURE_IN_CONTEXT, PICTURE_IN_LATENTS, TIME_OF_TOKENS]

Inputs = dict[str, Any]


def make_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small model whose every parameter matters."""
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 16,
        "ffn_dim": 112,
        "num_layers": 3,
        "rope_max_seq_len": 64,
    }
    generator = torch.Generator().manual_seed(0)
    model: Any = WanTransformer3DModel(**(config | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.5 / max(1, parameter[0].numel()) ** 0.5
            parameter.copy_(parameter * 0.5 + noise)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def make_inputs(model: Any, *, batch: int = 1, frames: int = 5, height: int = 8, width: int = 12) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    config, dtype = model.config, model.patch_embedding.weight.dtype

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tokens_of_frame = height * width // 4
    timestep = torch.full((batch,), 500.5)
    if config.in_channels == config.out_channels:  # a step for each token: the first frame is given
        timestep = timestep[:, None].repeat(1, frames * tokens_of_frame)
        timestep[:, :tokens_of_frame] = 0
    return {
        "hidden_states": noise(batch, config.in_channels, frames, height, width),
        "timestep": timestep,
        "encoder_hidden_states": noise(batch, 512, TEXT_WIDTH),
        "encoder_hidden_states_image": noise(batch, 257, PICTURE_WIDTH) if config.image_dim else None,
    }


def plain(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def in_chunks(model: Any, inputs: Inputs, workspace_bytes: int, runner: LayerRunner | None = None) -> torch.Tensor:
    with chunked_wan(model, ChunkSettings(workspace_bytes=workspace_bytes), runner=runner):
        return model(**inputs).sample


@pytest.fixture(scope="module", params=LAYOUTS, ids=["picture in context", "picture in latents", "time of tokens"])
def model(request: pytest.FixtureRequest) -> Any:
    """Shared by tests, which must leave it as it is."""
    return make_model(**request.param)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 100_000, EVERYTHING])
def test_equals_the_plain_forward_bit_for_bit(model: Any, workspace_bytes: int, batch: int) -> None:
    """But where tokens have time steps of their own: as two rows instead of many, these are summed in another order."""
    inputs = make_inputs(model, batch=batch)
    result, expected = in_chunks(model, inputs, workspace_bytes), plain(model, inputs)
    if inputs["timestep"].ndim == 1:
        assert torch.equal(result, expected)
    assert (result - expected).norm() <= 1e-6 * expected.norm()


@settings(max_examples=30, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    batch=st.integers(1, 2),
    frames=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    log_workspace=st.floats(math.log(1_000), math.log(20_000_000)),
)
def test_equals_the_plain_forward_at_any_size(
    layout: dict[str, Any], batch: int, frames: int, height: int, width: int, log_workspace: float
) -> None:
    model = make_model(num_layers=1, **layout)
    inputs = make_inputs(model, batch=batch, frames=frames, height=2 * height, width=2 * width)
    result, expected = in_chunks(model, inputs, int(math.exp(log_workspace))), plain(model, inputs)
    assert (result - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_equals_the_plain_forward(layout: dict[str, Any], dtype: torch.dtype) -> None:
    model = make_model(dtype, **layout)
    inputs = make_inputs(model, batch=2)
    result, expected = in_chunks(model, inputs, 50_000), plain(model, inputs)
    assert result.dtype is dtype
    assert (result - expected).float().norm() <= 1e-3 * expected.float().norm()


def test_norms_and_angles_may_be_fp32_in_a_model_of_half_precision() -> None:
    """As diffusers loads it: positions and time steps would suffer most from being rounded."""
    model = make_model(torch.bfloat16, **PICTURE_IN_CONTEXT)
    for name, part in model.named_modules():
        if name.endswith(("rope", "time_embedder", "norm2")):
            nn.Module.to(part, torch.float32)
    inputs = make_inputs(model)
    assert torch.equal(in_chunks(model, inputs, 50_000), plain(model, inputs))


def test_time_steps_may_change_from_token_to_token() -> None:
    model = make_model(**TIME_OF_TOKENS)
    inputs = make_inputs(model, batch=2)
    tokens = inputs["timestep"].shape[1]
    inputs["timestep"] = torch.randint(0, 4, (2, tokens), generator=torch.Generator().manual_seed(2)) * 250.0
    result, expected = in_chunks(model, inputs, 50_000), plain(model, inputs)
    assert (result - expected).norm() <= 1e-6 * expected.norm()


def test_a_time_step_of_many_tokens_is_embedded_once() -> None:
    model = make_model(**TIME_OF_TOKENS)
    embedded: list[int] = []
    model.condition_embedder.time_proj.register_forward_hook(lambda _, __, made: embedded.append(made.numel()))
    in_chunks(model, make_inputs(model), EVERYTHING)
    assert embedded == [2 * 6 * model.patch_embedding.out_channels]


def test_signature_result_types_and_strides_are_the_models_own(model: Any) -> None:
    inputs = make_inputs(model)
    expected, strides = in_chunks(model, inputs, EVERYTHING), plain(model, inputs).stride()
    with chunked_wan(model, ChunkSettings(workspace_bytes=EVERYTHING)):
        by_position = model(*inputs.values(), False)
        with_nothing_extra = model(**inputs, attention_kwargs={}).sample
    assert isinstance(by_position, tuple)
    assert torch.equal(by_position[0], expected)
    assert torch.equal(with_nothing_extra, expected)
    assert by_position[0].stride() == strides


def test_refuses_what_it_cannot_run_exactly() -> None:
    model = make_model()
    some = ChunkSettings(workspace_bytes=1)
    with pytest.raises(TypeError, match="Linear"), chunked_wan(nn.Linear(1, 1), some):
        pass
    with pytest.raises(ValueError, match="attention_kwargs"), chunked_wan(model, some):
        model(**make_inputs(model), attention_kwargs={"scale": 0.5})
    with pytest.raises(ValueError, match="eval"), chunked_wan(model.train(), some):
        pass
    model.eval().fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), chunked_wan(model, some):
        pass
    model.unfuse_qkv_projections()
    with chunked_wan(model, some):
        pass


def test_the_model_and_the_callers_tensors_are_the_same_afterwards(model: Any) -> None:
    inputs = make_inputs(model, batch=2)
    copies = {name: tensor.clone() for name, tensor in inputs.items() if tensor is not None}
    before = {name: dict(vars(part)) for name, part in model.named_modules()}
    for workspace_bytes in (SMALLEST, EVERYTHING):
        in_chunks(model, inputs, workspace_bytes)
    assert {name: dict(vars(part)) for name, part in model.named_modules()} == before
    assert all(torch.equal(inputs[name], copy) for name, copy in copies.items())


class StopError(Exception):
    pass


def test_on_chunk_may_stop_at_any_chunk(model: Any) -> None:
    inputs = make_inputs(model)
    expected = plain(model, inputs)
    chunks = 0

    def count() -> None:
        nonlocal chunks
        chunks += 1

    settings = ChunkSettings(workspace_bytes=SMALLEST)
    with chunked_wan(model, settings, on_chunk=count):
        model(**inputs)
    assert chunks > 40

    for last in range(1, chunks, 7):
        remaining = last

        def stop() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise StopError

        with pytest.raises(StopError), chunked_wan(model, settings, on_chunk=stop):
            model(**inputs)
    assert torch.equal(plain(model, inputs), expected)


class Streaming(LayerRunner):
    """Keeps weights elsewhere, not a number in their place, but for the layer that runs."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = {tensor: tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())}
        self.brought_in: Counter[torch.Tensor] = Counter()
        for tensor in self.kept:
            tensor.fill_(torch.nan)

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        tensors = [tensor for module in call.modules for tensor in (*module.parameters(), *module.buffers())]
        self.brought_in.update(tensors)
        for tensor in tensors:
            tensor.copy_(self.kept[tensor])
        yield
        for tensor in tensors:
            tensor.fill_(torch.nan)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("workspace_bytes", [SMALLEST, EVERYTHING])
def test_each_weight_is_brought_in_once_and_suffices(layout: dict[str, Any], workspace_bytes: int) -> None:
    model = make_model(**layout)
    inputs = make_inputs(model, batch=2)
    expected = in_chunks(model, inputs, workspace_bytes)
    streaming = Streaming(model)
    assert torch.equal(in_chunks(model, inputs, workspace_bytes, streaming), expected)
    assert streaming.brought_in == Counter((*model.parameters(), *model.buffers()))


WAN_14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}
WAN_5B: dict[str, Any] = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
}


def published(config: dict[str, Any], dtype: torch.dtype, **changes: Any) -> Any:
    """A model of the published widths, without memory; two of its blocks, which are all alike."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**({**config, "num_layers": 2} | changes))
    return nn.Module.to(model, dtype).eval().requires_grad_(False)


def published_inputs(model: Any, latent: tuple[int, int, int], dtype: torch.dtype, batch: int = 1) -> Inputs:
    """Meta inputs for latents of so many frames, rows and columns."""
    tokens = math.prod(latent) // 4
    of_tokens = model.config.in_channels == model.config.out_channels

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(batch, *shape, device="meta", dtype=dtype)

    return {
        "hidden_states": empty(model.config.in_channels, *latent),
        "timestep": torch.empty((batch, tokens) if of_tokens else (batch,), device="meta"),
        "encoder_hidden_states": empty(512, 4096),
        "encoder_hidden_states_image": empty(257, 1280) if model.config.image_dim else None,
    }


class Measuring(DistinctPieces):
    """Measures what each layer call takes beside what was there before it."""

    def __init__(self, meter: StorageMeter) -> None:
        self.meter = meter
        self.measured: list[tuple[LayerCall, int]] = []

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        before_bytes = self.meter.current_bytes
        self.meter.reset_peak()
        yield
        self.measured.append((call, self.meter.peak_bytes - before_bytes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("workspace_bytes", [1, 256 * MIB, EVERYTHING])
@pytest.mark.parametrize(
    ("config", "latent", "batch"),
    [(WAN_14B, (21, 60, 104), 1), (WAN_14B, (3, 30, 52), 2), (WAN_5B, (31, 44, 80), 1)],
)
def test_estimates_of_the_workspace_hold_for_every_layer(
    config: dict[str, Any], latent: tuple[int, int, int], batch: int, workspace_bytes: int, dtype: torch.dtype
) -> None:
    """Never more than 1 % under what is measured, nor 10 % over."""
    model = published(config, dtype)
    with StorageMeter() as meter, fused_attention():
        runner = Measuring(meter)
        in_chunks(model, published_inputs(model, latent, dtype, batch), workspace_bytes, runner)
    assert len(runner.measured) == 2 + 2 * 4 + 1
    for call, measured_bytes in runner.measured:
        assert measured_bytes <= call.workspace_bytes * 1.01 + VECTORS_BYTES, call
        assert measured_bytes >= call.workspace_bytes * 0.9 - VECTORS_BYTES, call


class Outlining(Outline):
    """Notes what an outline makes of the peak."""

    def __init__(self, meter: StorageMeter) -> None:
        self.meter = meter
        self.peak_bytes = 0

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        self.peak_bytes = max(self.peak_bytes, self.meter.current_bytes + call.workspace_bytes)
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("workspace_bytes", [64 * MIB, EVERYTHING])
@pytest.mark.parametrize(("config", "latent"), [(WAN_14B, (21, 90, 160)), (WAN_5B, (31, 44, 80))])
def test_an_outline_finds_the_peak_of_a_full_trace(
    config: dict[str, Any], latent: tuple[int, int, int], workspace_bytes: int, dtype: torch.dtype
) -> None:
    model = published(config, dtype)
    inputs = published_inputs(model, latent, dtype)
    with StorageMeter() as meter, fused_attention():
        in_chunks(model, inputs, workspace_bytes, DistinctPieces())
    with StorageMeter() as outlined, fused_attention():
        runner = Outlining(outlined)
        in_chunks(model, inputs, workspace_bytes, runner)
    assert 0.999 <= runner.peak_bytes / meter.peak_bytes <= 1.01


@pytest.mark.parametrize(
    ("config", "latent", "blocks", "most_gib"),
    [(WAN_14B, (21, 90, 160), 40, 3.0), (WAN_14B, (21, 60, 104), 40, 1.8), (WAN_5B, (31, 44, 80), 30, 1.0)],
    ids=["14B 1280×720×81", "14B 832×480×81", "5B 1280×704×121"],
)
def test_the_published_models_stay_within_their_bounds(
    config: dict[str, Any], latent: tuple[int, int, int], blocks: int, most_gib: float
) -> None:
    """bf16, one branch, pieces of 256 MiB, with the weights of two layer calls beside them. Beyond the first, blocks
    change nothing.
    """
    dtype = torch.bfloat16
    peaks: dict[int, int] = {}
    for count in (1, blocks):
        model = published(config, dtype, num_layers=count)
        with StorageMeter() as meter, fused_attention():
            runner = Measuring(meter)
            in_chunks(model, published_inputs(model, latent, dtype), 256 * MIB, runner)
        peaks[count] = meter.peak_bytes
    of_calls = [
        sum(tensor.nbytes for module in call.modules for tensor in module.parameters()) for call, _ in runner.measured
    ]
    two_calls_bytes = max(map(sum, pairwise(of_calls)))
    assert peaks[1] == peaks[blocks]
    assert peaks[blocks] + two_calls_bytes <= most_gib * GIB


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tracing_distinct_pieces_predicts_the_peak_of_a_run(layout: dict[str, Any], dtype: torch.dtype) -> None:
    """On meta tensors with few of the chunks, against real tensors with all of them. Attention's kernel for a CPU gives
    out its fp32 sums, which those of GPUs keep: a number a token and head.
    """
    model = make_model(dtype, **layout)
    inputs = make_inputs(model, batch=2, frames=7, height=18, width=12)
    with StorageMeter() as meter:
        in_chunks(model, inputs, 200_000)
    peaks = meter.peak_bytes
    model.to("meta")
    inputs = {name: None if tensor is None else tensor.to("meta") for name, tensor in inputs.items()}
    with StorageMeter() as meter, fused_attention():
        in_chunks(model, inputs, 200_000, DistinctPieces())
    assert peaks == meter.peak_bytes


def test_runs_on_an_emulated_device_of_just_its_peak(model: Any) -> None:
    inputs = make_inputs(model, batch=2)
    with StorageMeter() as meter:
        expected = in_chunks(model, inputs, 50_000)
    with StorageMeter(limit_bytes=meter.peak_bytes):
        assert torch.equal(in_chunks(model, inputs, 50_000), expected)
    with StorageMeter(limit_bytes=meter.peak_bytes - 1), pytest.raises(torch.OutOfMemoryError):
        in_chunks(model, inputs, 50_000)


def test_peaks_fall_with_the_workspace(model: Any) -> None:
    inputs = make_inputs(model, frames=9, height=24, width=24)
    peaks: list[int] = []
    runs: list[Callable[[], object]] = [
        lambda: plain(model, inputs),
        lambda: in_chunks(model, inputs, 400_000),
        lambda: in_chunks(model, inputs, 50_000),
    ]
    for run in runs:
        with StorageMeter() as meter:
            run()
        peaks.append(meter.peak_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[2] < peaks[0] / 2
