"""Tiled temporal decoder: the result of its own forward over all frames, in a fraction of the memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i2v_core.chunking import DistinctChunks, LayerRunner
from i2v_core.decoding import TilingSettings, decode_clip_into, encode_mode
from i2v_core.families import Placed, VideoSize, bundled_architecture, family_of
from i2v_core.placement.streaming import streamed
from i2v_core.planning.candidates import decode_candidates, decode_tiling
from i2v_core.planning.plan import DecodeSettings
from i2v_core.planning.predict import predict_decode
from i2v_core.planning.request import Request
from i2v_core.planning.trace import autoencoder_template, skeleton, tracing
from i2v_core.units import GIB, KIB, MIB
from tests.measures import relative_rms

PUBLISHED = bundled_architecture("svd")
META = torch.device("meta")
COMPRESSION = 4


pytestmark = pytest.mark.usefixtures("one_thread")


def make_vae(**changes: Any) -> Any:
    """Return an autoencoder in which every parameter matters, shortcuts and temporal weights included."""
    torch.manual_seed(0)
    config = {"block_out_channels": (32, 64, 64), "down_block_types": ("DownEncoderBlock2D",) * 3}
    model: Any = AutoencoderKLTemporalDecoder
    vae = model(**(config | changes)).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return vae


VAE = make_vae()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def decoded(vae: Any, samples: Tensor, tiling: TilingSettings, runner: LayerRunner | None = None) -> Tensor:
    frames = torch.empty(len(samples), *(side * COMPRESSION for side in samples.shape[2:]), 3)
    with torch.no_grad():
        decode_clip_into(vae, samples, frames, tiling, runner=runner or LayerRunner(), on_chunk=lambda: None)
    return frames


def plainly_decoded(vae: Any, samples: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.decode(samples, num_frames=len(samples)).sample.permute(0, 2, 3, 1).float()


@settings(max_examples=30, deadline=None)
@given(
    frames=st.integers(1, 6),
    height=st.integers(2, 13),
    width=st.integers(2, 11),
    tile_pixels=st.integers(1, 160),
    maps_bytes=st.sampled_from((None, 0, 100 * KIB)),
)
def test_any_size_and_any_tile_give_the_plain_result(
    frames: int, height: int, width: int, tile_pixels: int, maps_bytes: int | None
) -> None:
    """Covers odd sizes, one frame and many, and maps on the device and offloaded."""
    tiling = TilingSettings(chunk_size=frames, tile_pixels=tile_pixels, maps_bytes=maps_bytes)
    samples = noise(frames, 4, height, width)
    assert relative_rms(decoded(VAE, samples, tiling), plainly_decoded(VAE, samples)) <= 1e-5


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_other_depths_and_the_encoder(layers: int) -> None:
    """Includes three layers a block, of which the middle block's own forward skips some."""
    vae = make_vae(layers_per_block=layers)
    samples, tiling = noise(3, 4, 6, 5), TilingSettings(chunk_size=3, tile_pixels=20, maps_bytes=50 * KIB)
    assert relative_rms(decoded(vae, samples, tiling), plainly_decoded(vae, samples)) <= 1e-5
    pixels = noise(1, 3, 24, 20)
    with torch.no_grad():
        ours = encode_mode(vae, pixels, tiling, runner=LayerRunner(), on_chunk=lambda: None)
        assert relative_rms(ours, vae.encode(pixels).latent_dist.mode()) <= 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_half_precision_is_as_close_to_fp32_as_the_plain_forward(dtype: torch.dtype, tolerance: float) -> None:
    samples = noise(4, 4, 7, 6)
    exact, vae = plainly_decoded(VAE, samples), make_vae().to(dtype)
    plain = plainly_decoded(vae, samples.to(dtype))
    tiled = decoded(vae, samples.to(dtype), TilingSettings(chunk_size=4, tile_pixels=24, maps_bytes=0))
    assert relative_rms(tiled, plain) <= tolerance
    assert relative_rms(tiled, exact) <= 1.1 * relative_rms(plain, exact)


def test_streamed_weights_give_the_same_and_come_once() -> None:
    samples, tiling = noise(3, 4, 6, 5), TilingSettings(chunk_size=3, tile_pixels=20)
    resident = decoded(VAE, samples, tiling)
    with streamed(VAE, torch.device("cpu"), torch.float32) as stream:
        assert torch.equal(decoded(VAE, samples, tiling, stream), resident)
        assert stream.loaded_bytes <= 1.05 * sum(it.nbytes for it in VAE.decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tile_pixels", [1024, 128])
@pytest.mark.parametrize("maps_bytes", [None, 256 * MIB, 0])
def test_a_shape_only_trace_finds_the_peak_of_a_full_trace(
    tile_pixels: int, maps_bytes: int | None, dtype: torch.dtype
) -> None:
    """Traces the published model: under by at most vectors of one number a channel, over by at most 2 %."""
    family, size = family_of(PUBLISHED), VideoSize(width_pixels=520, height_pixels=320, frames=14)
    tiling = TilingSettings(chunk_size=size.frames, tile_pixels=tile_pixels, maps_bytes=maps_bytes)
    workload, vae = family.decode_workload(size, tiling), skeleton(PUBLISHED, "vae", dtype)
    calls = autoencoder_template(vae, workload, dtype).for_workspace(1).calls
    shape_only_peak = max(call.activation_bytes for call in calls)
    with tracing() as meter:
        workload.run(Placed(module=vae, device=META, dtype=dtype, runner=DistinctChunks()))
    assert meter.peak_bytes - 512 * KIB <= shape_only_peak <= 1.02 * meter.peak_bytes


@pytest.mark.parametrize(("width", "height", "frames"), [(1024, 576, 14), (1024, 576, 25), (576, 1024, 25)])
def test_a_clip_decodes_in_little_memory(width: int, height: int, frames: int) -> None:
    """Predicts the published model in fp16, weights included; its own forward takes 28 GiB for 25 frames."""
    request = Request(architecture=PUBLISHED, size=VideoSize(width_pixels=width, height_pixels=height, frames=frames))
    for tile_pixels, maps_bytes, limit_gib in ((128, 0, 0.4), (512, 512 * MIB, 1.4)):
        tiling = decode_tiling(request, tile_pixels)
        candidate = DecodeSettings(tiling=replace(tiling, maps_bytes=maps_bytes))
        assert predict_decode(request, candidate, torch.float16).peak_bytes <= limit_gib * GIB


def test_every_candidate_decodes_all_frames_at_once() -> None:
    """Fewer frames at a time would not give the exact result."""
    size = VideoSize(width_pixels=1024, height_pixels=576, frames=25)
    groups = decode_candidates(Request(architecture=PUBLISHED, size=size))
    assert {candidate.tiling.chunk_size for group in groups for candidate in group} == {25}
