"""What chunked execution takes, counted in live storages: estimates hold, peaks fall, and the published model fits."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from i2v_core.chunking import ChunkSettings, DistinctPieces, LayerCall, LayerRunner
from i2v_core.memory.meter import StorageMeter, fused_attention
from tests.chunking.subjects import SUBJECTS, Inputs, Subject, chunked

MakeUnet = Callable[..., Any]
MakeInputs = Callable[..., Inputs]

GIB = 2**30
MIB = 2**20
VECTORS_BYTES = 64 * 1024
"""For what estimates leave out: statistics, scales and shifts, of one number a channel."""


@pytest.fixture(scope="module")
def published_unet(subject: Subject) -> Any:
    return subject.published()


def peak_bytes(unet: Any, inputs: Inputs, settings: ChunkSettings | None, runner: LayerRunner | None = None) -> int:
    """The peak of one forward, chunked or (without settings) plain."""
    with torch.no_grad(), StorageMeter() as meter, fused_attention():
        if settings is None:
            unet(**inputs)
        else:
            with chunked(unet, settings, runner=runner):
                unet(**inputs)
    return meter.peak_bytes


class Measuring(DistinctPieces):
    """Measures the workspace of each layer call: what it takes beside its input, output and scratch tensor."""

    def __init__(self, meter: StorageMeter, tokens_a_pixel: int) -> None:
        self.meter = meter
        self.tokens_a_pixel = tokens_a_pixel
        self.measured: list[tuple[LayerCall, int]] = []

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        before_bytes = self.meter.current_bytes
        self.meter.reset_peak()
        yield
        taken_bytes = self.meter.peak_bytes - before_bytes
        layer: Any = call.modules[0]
        if call.kind == "temporal_conv" and not call.whole:
            scratch_bytes = layer.in_dim * 2 * call.total * self.tokens_a_pixel
            self.measured.append((call, taken_bytes - scratch_bytes))
        elif call.chunk_size < call.total:
            output_bytes = self.meter.current_bytes - before_bytes
            self.measured.append((call, taken_bytes - output_bytes))
        else:  # the only chunk's result is part of its workspace
            self.measured.append((call, taken_bytes))


@pytest.mark.parametrize(
    ("batch", "size", "workspace_bytes", "park_skips"),
    [
        (1, (512, 512, 16), 64 * MIB, False),
        (2, (512, 512, 16), 4 * GIB, False),
        (2, (768, 768, 24), 256 * MIB, True),
        (1, (1280, 704, 16), 10 * MIB, True),
        (2, (256, 256, 5), 1, False),
    ],
)
def test_estimates_of_the_workspace_hold_for_every_layer(
    subject: Subject,
    published_unet: Any,
    batch: int,
    size: tuple[int, int, int],
    workspace_bytes: int,
    park_skips: bool,
) -> None:
    """Never more than 1 % under what is measured, nor 10 % over."""
    settings = ChunkSettings(workspace_bytes=workspace_bytes, park_skips=park_skips)
    with StorageMeter() as meter, fused_attention():
        runner = Measuring(meter, tokens_a_pixel=batch * size[2])
        with chunked(published_unet, settings, runner=runner):
            published_unet(**subject.published_inputs(batch, *size))
    assert len(runner.measured) > 80
    for call, measured_bytes in runner.measured:
        assert measured_bytes <= call.workspace_bytes * 1.01 + VECTORS_BYTES, call
        assert measured_bytes >= call.workspace_bytes * 0.9, call


class WeightsOfLayers(DistinctPieces):
    """Notes the bytes of the weights that each layer call needs, in fp16."""

    def __init__(self) -> None:
        self.of_calls_bytes: list[int] = []

    def enter(self, call: LayerCall) -> Any:
        parameters = [parameter for module in call.modules for parameter in module.parameters()]
        self.of_calls_bytes.append(2 * sum(parameter.numel() for parameter in parameters))
        return super().enter(call)


SKIPS_CHANNELS = 3 * 320 + (320 + 2 * 640) // 4 + (640 + 2 * 1280) // 16 + 3 * 1280 // 64
"""All skip connections together, as so many channels at full latent resolution: 1620. Above them, at the deepest level,
stand the hidden state and its scratch tensor (2 × 20); without them, at the outermost, the same two (2 × 320)."""


@pytest.mark.parametrize(
    ("subject", "size"), [(name, size) for name, it in SUBJECTS.items() for size in it.bounds_gib], indirect=["subject"]
)
def test_the_published_model_stays_within_its_bounds(
    subject: Subject, published_unet: Any, size: tuple[int, int, int]
) -> None:
    """With all weights resident, and with those of two layers; guidance one branch after the other."""
    workspace_bytes = 128 * MIB
    inputs = subject.published_inputs(1, *size)
    weights = WeightsOfLayers()
    resident_gib, streamed_gib = subject.bounds_gib[size]
    resident_bytes = peak_bytes(published_unet, inputs, ChunkSettings(workspace_bytes=workspace_bytes), weights)
    assert sum(weights.of_calls_bytes) + resident_bytes <= resident_gib * GIB
    two_layers_bytes = max(first + second for first, second in pairwise(weights.of_calls_bytes))
    assert two_layers_bytes + resident_bytes <= streamed_gib * GIB

    parked = ChunkSettings(workspace_bytes=workspace_bytes, park_skips=True)
    parked_bytes = peak_bytes(published_unet, inputs, parked, DistinctPieces())
    width, height, frames = size
    channel_bytes = 2 * frames * (height // 8) * (width // 8)
    assert resident_bytes <= (SKIPS_CHANNELS + 40) * channel_bytes + workspace_bytes
    assert parked_bytes <= 2 * 320 * channel_bytes * 1.01 + workspace_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_bytes", [30_000, 1_000_000])
@pytest.mark.parametrize(("batch", "park_skips"), [(1, False), (2, True)])
def test_tracing_distinct_pieces_predicts_the_peak_of_a_run(
    make_unet: MakeUnet,
    make_inputs: MakeInputs,
    batch: int,
    park_skips: bool,
    workspace_bytes: int,
    dtype: torch.dtype,
) -> None:
    """To the byte: on meta tensors with few of the chunks, against real tensors with all of them."""
    unet: Any = make_unet(dtype)
    inputs = make_inputs(batch=batch, frames=7, latent_height=18, latent_width=12, dtype=dtype)
    settings = ChunkSettings(workspace_bytes=workspace_bytes, park_skips=park_skips)
    with StorageMeter() as meter, chunked(unet, settings):
        unet(**inputs)
    unet.to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    assert peak_bytes(unet, inputs, settings, DistinctPieces()) == meter.peak_bytes


def test_peaks_fall_with_the_workspace_and_again_without_skips(unet: Any, make_inputs: MakeInputs) -> None:
    """On real tensors."""
    inputs = make_inputs(frames=8, latent_height=32, latent_width=32)
    plain, coarse, fine, parked = (
        peak_bytes(unet, inputs, settings)
        for settings in (
            None,
            ChunkSettings(workspace_bytes=4_000_000),
            ChunkSettings(workspace_bytes=200_000),
            ChunkSettings(workspace_bytes=200_000, park_skips=True),
        )
    )
    assert plain > coarse > fine > parked
    assert fine < plain / 3


def test_nothing_but_the_result_lives_on(unet: Any, make_inputs: MakeInputs) -> None:
    with StorageMeter() as meter:
        inputs = make_inputs()
        before_bytes = meter.current_bytes
        with chunked(unet, ChunkSettings(workspace_bytes=20_000, park_skips=True)):
            result = unet(**inputs).sample
            assert meter.current_bytes == before_bytes + 4 * result.numel()
            del result
        assert meter.current_bytes == before_bytes


def test_runs_on_an_emulated_device_of_just_its_peak(unet: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(frames=4)
    settings = ChunkSettings(workspace_bytes=50_000)
    peak = peak_bytes(unet, inputs, settings)
    with torch.no_grad():
        plain = unet(**inputs).sample
    with chunked(unet, settings):
        with StorageMeter(limit_bytes=peak):
            unet(**inputs)
        with StorageMeter(limit_bytes=peak - 1), pytest.raises(torch.OutOfMemoryError):
            unet(**inputs)
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, plain)


def test_attention_batches_stay_within_what_cuda_takes(subject: Subject) -> None:
    """256 × 264 latent pixels are more than 65,535: too large a batch for temporal attention, however much memory."""
    batches: list[int] = []

    class Recording(AttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            batches.append(len(hidden_states))
            return super().__call__(attn, hidden_states, *args, **kwargs)

    unet: Any = subject.make(torch.float16, **subject.published_layout, cross_attention_dim=1024)
    nn.Module.to(unet, "meta")
    unet.set_attn_processor(Recording())
    with fused_attention(), chunked(unet, ChunkSettings(workspace_bytes=2**60)):
        unet(**subject.published_inputs(1, 256 * 8, 264 * 8, 2))
    assert max(batches) == 256 * 264 / 2
