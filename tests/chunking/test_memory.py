"""Memory of chunked execution, counted in live storages: estimates hold, peaks fall, and the published model fits."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch

from i2v_core.chunking import ChunkSettings, DistinctChunks, LayerCall, LayerRunner
from i2v_core.memory.meter import StorageMeter, fused_attention
from i2v_core.units import GIB, MIB
from tests.marking import first_quick
from tests.subjects import SUBJECTS, DenoiserSubject, Inputs, Subject

MakeInputs = Callable[..., Inputs]
PeakBytes = Callable[..., int]

VECTORS_BYTES = 64 * 1024
"""Allowance for tensors that estimates leave out: statistics, scales and shifts, of one number a channel."""


@pytest.fixture(scope="session")
def peak_bytes(kind: DenoiserSubject) -> PeakBytes:
    """Return a function that gives the peak of one forward, chunked or (without settings) plain."""

    def run(denoiser: Any, inputs: Inputs, settings: ChunkSettings | None, runner: LayerRunner | None = None) -> int:
        chunks = kind.chunked(denoiser, settings, runner=runner) if settings else nullcontext()
        with torch.no_grad(), StorageMeter() as meter, fused_attention(), chunks:
            denoiser(**inputs)
        return meter.peak_bytes

    return run


class Measuring(DistinctChunks):
    """Measures the workspace of each layer call: its memory beside input, output and scratch tensor."""

    def __init__(self, meter: StorageMeter, channel_of_pixel_bytes: int) -> None:
        self.meter = meter
        self.channel_of_pixel_bytes = channel_of_pixel_bytes
        self.measured: list[tuple[LayerCall, int]] = []

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        before_bytes = self.meter.current_bytes
        self.meter.reset_peak()
        yield
        taken_bytes = self.meter.peak_bytes - before_bytes
        layer: Any = call.modules[0]
        if call.kind == "temporal_conv" and not call.unchunked:
            scratch_bytes = layer.in_dim * call.total * self.channel_of_pixel_bytes
            self.measured.append((call, taken_bytes - scratch_bytes))
        elif call.chunk_size < call.total and not call.result_excluded:
            output_bytes = self.meter.current_bytes - before_bytes
            self.measured.append((call, taken_bytes - output_bytes))
        else:  # the only chunk's result is part of its workspace, or was allocated before
            self.measured.append((call, taken_bytes))


@pytest.mark.parametrize(
    ("batch", "size", "workspace_bytes", "offload_skips", "dtype"),
    first_quick(
        [
            (1, (512, 512, 16), 64 * MIB, False, torch.float16),
            (2, (512, 512, 16), 4 * GIB, False, torch.float16),
            (2, (768, 768, 24), 256 * MIB, True, torch.float16),
            (1, (1280, 704, 16), 10 * MIB, True, torch.float16),
            (1, (832, 480, 81), 256 * MIB, False, torch.float32),
            (2, (256, 256, 5), 1, False, torch.float16),
        ]
    ),
)
def test_estimates_of_the_workspace_hold_for_every_layer(
    subject: Subject,
    batch: int,
    size: tuple[int, int, int],
    workspace_bytes: int,
    offload_skips: bool,
    dtype: torch.dtype,
) -> None:
    """Allows estimates to be 1 % under the measured workspace, or 10 % over."""
    settings = ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=offload_skips)
    denoiser, video = subject.published_denoiser(dtype, all_layers=False), subject.size(*size)
    with StorageMeter() as meter, fused_attention():
        runner = Measuring(meter, channel_of_pixel_bytes=batch * video.frames * dtype.itemsize)
        with subject.denoiser.chunked(denoiser, settings, runner=runner):
            denoiser(**subject.published_inputs(batch, video, dtype))
    assert len(runner.measured) > 10
    for call, measured_bytes in runner.measured:
        assert measured_bytes <= call.workspace_bytes * 1.01 + VECTORS_BYTES, call
        assert measured_bytes >= call.workspace_bytes * 0.9, call


class WeightsOfLayers(DistinctChunks):
    """Records the bytes of the weights that each layer call needs, in fp16."""

    def __init__(self) -> None:
        self.of_calls_bytes: list[int] = []

    def enter(self, call: LayerCall) -> Any:
        parameters = [parameter for module in call.modules for parameter in module.parameters()]
        self.of_calls_bytes.append(2 * sum(parameter.numel() for parameter in parameters))
        return super().enter(call)


SKIPS_CHANNELS = 3 * 320 + (320 + 2 * 640) // 4 + (640 + 2 * 1280) // 16 + 3 * 1280 // 64
"""All skip connections together, as so many channels at full latent resolution: 1620. Above them, at the deepest level,
stand the hidden state and its scratch tensor (2 × 20); without them, at the outermost, the same two (2 × 320)."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subject", "size"),
    [(name, size) for name, it in SUBJECTS.items() for size in it.denoiser.bounds_gib],
    indirect=["subject"],
)
def test_the_published_model_stays_within_its_bounds(
    subject: Subject, peak_bytes: PeakBytes, size: tuple[int, int, int]
) -> None:
    """Counts all weights, or those of two layer calls, with one guidance branch at a time."""
    workspace_bytes = 128 * MIB
    denoiser, video = subject.published_denoiser(torch.float16), subject.size(*size)
    inputs = subject.published_inputs(1, video, torch.float16)
    weights = WeightsOfLayers()
    resident_gib, streamed_gib = subject.denoiser.bounds_gib[size]
    resident_bytes = peak_bytes(denoiser, inputs, ChunkSettings(workspace_bytes=workspace_bytes), weights)
    assert sum(weights.of_calls_bytes) + resident_bytes <= resident_gib * GIB
    two_layers_bytes = max(first + second for first, second in pairwise(weights.of_calls_bytes))
    assert two_layers_bytes + resident_bytes <= streamed_gib * GIB
    if not subject.denoiser.has_skips:
        return

    offloaded = ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=True)
    offloaded_bytes = peak_bytes(denoiser, inputs, offloaded, DistinctChunks())
    width, height, frames = size
    channel_bytes = 2 * frames * (height // 8) * (width // 8)
    assert resident_bytes <= (SKIPS_CHANNELS + 40) * channel_bytes + workspace_bytes
    assert offloaded_bytes <= 2 * 320 * channel_bytes * 1.01 + workspace_bytes


@pytest.mark.parametrize(
    ("batch", "offload_skips", "workspace_bytes", "dtype"),
    first_quick(
        [  # any two of them in every combination
            (1, False, 30_000, torch.float32),
            (1, False, 1_000_000, torch.bfloat16),
            (2, True, 30_000, torch.bfloat16),
            (2, True, 1_000_000, torch.float32),
        ]
    ),
)
def test_tracing_distinct_chunks_predicts_the_peak_of_a_run(
    kind: DenoiserSubject,
    peak_bytes: PeakBytes,
    make_inputs: MakeInputs,
    batch: int,
    offload_skips: bool,
    workspace_bytes: int,
    dtype: torch.dtype,
) -> None:
    """Compares a trace on meta tensors with few of the chunks to a run on real tensors, to the byte."""
    denoiser: Any = kind.make(dtype)
    inputs = make_inputs(batch=batch, frames=7, latent_height=18, latent_width=12, dtype=dtype)
    settings = ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=offload_skips)
    with StorageMeter() as meter, kind.chunked(denoiser, settings):
        denoiser(**inputs)
    denoiser.to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    assert peak_bytes(denoiser, inputs, settings, DistinctChunks()) == meter.peak_bytes


def test_peaks_fall_with_the_workspace_and_again_without_skips(
    kind: DenoiserSubject, denoiser: Any, peak_bytes: PeakBytes, make_inputs: MakeInputs
) -> None:
    """Runs real tensors."""
    inputs = make_inputs(frames=8, latent_height=32, latent_width=32)
    plain, coarse, fine = (
        peak_bytes(denoiser, inputs, settings)
        for settings in (
            None,
            ChunkSettings(workspace_bytes=4_000_000),
            ChunkSettings(workspace_bytes=200_000),
        )
    )
    assert plain > coarse > fine
    assert fine < plain / 2
    if kind.has_skips:
        offloaded = peak_bytes(denoiser, inputs, ChunkSettings(workspace_bytes=200_000, offload_skips=True))
        assert offloaded < fine < plain / 3


def test_nothing_but_the_result_lives_on(kind: DenoiserSubject, denoiser: Any, make_inputs: MakeInputs) -> None:
    with StorageMeter() as meter:
        inputs = make_inputs()
        before_bytes = meter.current_bytes
        with kind.chunked(denoiser, ChunkSettings(workspace_bytes=20_000, offload_skips=True)):
            result = denoiser(**inputs).sample
            assert meter.current_bytes == before_bytes + 4 * result.numel()
            del result
        assert meter.current_bytes == before_bytes


def test_runs_on_an_emulated_device_of_just_its_peak(
    kind: DenoiserSubject, denoiser: Any, peak_bytes: PeakBytes, make_inputs: MakeInputs
) -> None:
    inputs = make_inputs(frames=4)
    settings = ChunkSettings(workspace_bytes=50_000)
    peak = peak_bytes(denoiser, inputs, settings)
    with torch.no_grad():
        plain = denoiser(**inputs).sample
    with kind.chunked(denoiser, settings):
        with StorageMeter(limit_bytes=peak):
            denoiser(**inputs)
        with StorageMeter(limit_bytes=peak - 1), pytest.raises(torch.OutOfMemoryError):
            denoiser(**inputs)
    with torch.no_grad():
        assert torch.equal(denoiser(**inputs).sample, plain)
