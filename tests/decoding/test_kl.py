"""Tiled AutoencoderKL: the result of its own forward for any tile, within the predicted memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from i2v_core.chunking import DistinctChunks, LayerRunner
from i2v_core.decoding import TilingSettings, decode_into, encode_mode, supports_row_tiles
from i2v_core.decoding.feature_map import FeatureMaps
from i2v_core.families import Placed, VideoSize, bundled_architecture, family_of
from i2v_core.placement.streaming import streamed
from i2v_core.planning.plan import DecodeSettings, EncodeSettings, Stage
from i2v_core.planning.predict import predict_decode, predict_encode
from i2v_core.planning.request import Request
from i2v_core.planning.trace import autoencoder_template, skeleton, tracing
from i2v_core.units import GIB, KIB, MIB
from tests.measures import relative_rms

DEMO_VAE = Path(__file__).parents[2] / "assets" / "demo_model" / "vae"
PUBLISHED = bundled_architecture("i2vgen-xl")
META = torch.device("meta")
DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


pytestmark = pytest.mark.usefixtures("one_thread")


def make_vae(**changes: Any) -> Any:
    """Return an autoencoder in which every parameter matters, shortcuts and narrowing convolutions included."""
    config: dict[str, Any] = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": (DOWN,) * 3,
        "up_block_types": (UP,) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    torch.manual_seed(0)
    model: Any = AutoencoderKL
    vae = model(**(config | changes)).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return vae


VAE = make_vae()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def decoded(vae: Any, samples: Tensor, tiling: TilingSettings, runner: LayerRunner | None = None) -> Tensor:
    compression = 2 ** (len(vae.config.block_out_channels) - 1)
    frames = torch.empty(len(samples), *(side * compression for side in samples.shape[2:]), 3)
    with torch.no_grad():
        decode_into(vae, samples, frames, tiling, runner=runner or LayerRunner(), on_chunk=lambda: None)
    return frames


def encoded(vae: Any, pixels: Tensor, tiling: TilingSettings) -> Tensor:
    with torch.no_grad():
        return encode_mode(vae, pixels, tiling, runner=LayerRunner(), on_chunk=lambda: None)


def plainly_decoded(vae: Any, samples: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.decode(samples).sample.permute(0, 2, 3, 1).float()


def plainly_encoded(vae: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mode()


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 2),
    height=st.integers(1, 23),
    width=st.integers(1, 17),
    tile_pixels=st.integers(1, 120),
    maps_bytes=st.sampled_from((None, 0, 20 * KIB, 200 * KIB)),
)
def test_any_size_and_any_tile_give_the_plain_result(
    frames: int, height: int, width: int, tile_pixels: int, maps_bytes: int | None
) -> None:
    """Covers odd sizes, tiles smaller than a row and larger than the frame, and maps on the device and offloaded."""
    tiling = TilingSettings(chunk_size=frames, tile_pixels=tile_pixels, maps_bytes=maps_bytes)
    samples = noise(frames, 4, height, width)
    assert relative_rms(decoded(VAE, samples, tiling), plainly_decoded(VAE, samples)) <= 1e-5
    pixels = noise(frames, 3, 4 * height, 4 * width)
    assert relative_rms(encoded(VAE, pixels, tiling), plainly_encoded(VAE, pixels)) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"layers_per_block": 2, "norm_num_groups": 8, "latent_channels": 16},
        {"block_out_channels": (8,), "down_block_types": (DOWN,), "up_block_types": (UP,)},
    ],
)
def test_other_configs_of_the_same_class(changes: dict[str, Any]) -> None:
    vae = make_vae(**changes)
    tiling = TilingSettings(chunk_size=1, tile_pixels=20, maps_bytes=30 * KIB)
    compression = 2 ** (len(vae.config.block_out_channels) - 1)
    samples, pixels = noise(1, vae.config.latent_channels, 9, 7), noise(1, 3, 9 * compression, 7 * compression)
    assert relative_rms(decoded(vae, samples, tiling), plainly_decoded(vae, samples)) <= 1e-5
    assert relative_rms(encoded(vae, pixels, tiling), plainly_encoded(vae, pixels)) <= 1e-5


@pytest.mark.parametrize(("dtype", "levels"), [(torch.float16, 1), (torch.bfloat16, 8)])
def test_in_half_precision_no_pixel_is_off_by_more_than_rounding(dtype: torch.dtype, levels: int) -> None:
    """Uses a trained autoencoder and its own latents, so that results are pictures; levels are 255ths of the range."""
    vae: Any = AutoencoderKL.from_pretrained(DEMO_VAE).eval()
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), size=(96, 128), mode="bicubic") * 2 - 1
    samples = plainly_encoded(vae, picture)
    exact = plainly_decoded(vae, samples)
    vae.to(dtype)
    plain = plainly_decoded(vae, samples.to(dtype))
    tiled = decoded(vae, samples.to(dtype), TilingSettings(chunk_size=1, tile_pixels=32))
    assert (tiled - plain).abs().max() / 2 <= levels / 255
    assert (tiled - exact).square().mean() <= 1.1**2 * (plain - exact).square().mean()


def test_streamed_weights_give_the_same_and_leave_the_model_as_it_was() -> None:
    samples, tiling = noise(1, 4, 9, 7), TilingSettings(chunk_size=1, tile_pixels=20)
    before = [parameter.data_ptr() for parameter in VAE.parameters()]
    resident = decoded(VAE, samples, tiling)
    with streamed(VAE, torch.device("cpu"), torch.float32) as stream:
        assert torch.equal(decoded(VAE, samples, tiling, stream), resident)
        once = stream.loaded_bytes
        assert once < 1.05 * sum(it.nbytes for it in VAE.parameters())
    assert [parameter.data_ptr() for parameter in VAE.parameters()] == before


def test_a_cancel_is_raised_between_two_tiles() -> None:
    calls = 0

    def cancel() -> None:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt

    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        decode_into(
            VAE,
            noise(1, 4, 9, 7),
            torch.empty(1, 36, 28, 3),
            TilingSettings(chunk_size=1, tile_pixels=8),
            runner=LayerRunner(),
            on_chunk=cancel,
        )
    assert calls == 20


def test_unknown_layers_are_not_tiled() -> None:
    assert supports_row_tiles(VAE.config)
    assert not supports_row_tiles({"up_block_types": (UP, "AttnUpDecoderBlock2D"), "down_block_types": (DOWN,)})
    assert not supports_row_tiles({"up_block_types": (UP,), "down_block_types": (DOWN,), "act_fn": "gelu"})


def test_maps_beyond_the_limit_are_offloaded_until_others_are_freed() -> None:
    maps = FeatureMaps(torch.device("cpu"), torch.float32, limit_bytes=8 * KIB, groups=4)
    first = maps.new(1, 4, 16, 16)
    second = maps.new(1, 4, 16, 16)
    assert [first.offloaded, second.offloaded, maps.new(1, 4, 16, 16).offloaded] == [False, False, True]
    del first
    assert not maps.new(1, 4, 16, 16).offloaded


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("tile_pixels", [1024, 256, 64])
@pytest.mark.parametrize("maps_bytes", [None, 256 * MIB, 0])
@pytest.mark.parametrize("stage", [Stage.ENCODE, Stage.DECODE])
def test_a_shape_only_trace_finds_the_peak_of_a_full_trace(
    stage: Stage, tile_pixels: int, maps_bytes: int | None, dtype: torch.dtype
) -> None:
    """Traces the published model: under by at most vectors of one number a channel, over by at most 2 %."""
    family, size = family_of(PUBLISHED), VideoSize(width_pixels=768, height_pixels=520, frames=1)
    tiling = TilingSettings(chunk_size=1, tile_pixels=tile_pixels, maps_bytes=maps_bytes)
    encode = family.encode_workloads(PUBLISHED, size, guidance=False, tiling=tiling)[-1]
    workload = {Stage.ENCODE: encode, Stage.DECODE: family.decode_workload(size, tiling)}[stage]
    vae = skeleton(PUBLISHED, "vae", dtype)
    calls = autoencoder_template(vae, workload, dtype).for_workspace(1).calls
    shape_only_peak = max(call.activation_bytes for call in calls)
    with tracing() as meter:
        workload.run(Placed(module=vae, device=META, dtype=dtype, runner=DistinctChunks()))
    assert meter.peak_bytes - 64 * KIB <= shape_only_peak <= 1.02 * meter.peak_bytes


@pytest.mark.parametrize(
    ("side", "maps_bytes", "limit_gib"), [(1024, 512 * MIB, 0.6), (2048, 512 * MIB, 1.0), (2048, 0, 0.5)]
)
def test_large_frames_decode_in_little_memory(side: int, maps_bytes: int, limit_gib: float) -> None:
    """Predicts the published model in fp16, without weights; untiled frames take 1.5 and 6 GiB."""
    size = VideoSize(width_pixels=side, height_pixels=side, frames=32)
    tiling = TilingSettings(chunk_size=1, tile_pixels=128, maps_bytes=maps_bytes)
    request = Request(architecture=PUBLISHED, size=size)
    decode = predict_decode(request, DecodeSettings(tiling=tiling), torch.float16)
    assert decode.activation_bytes <= limit_gib * GIB
    encode = predict_encode(request, EncodeSettings(tiling=tiling, streamed=True), torch.float16)
    assert encode.activation_bytes <= (limit_gib + 0.1) * GIB


def test_a_tile_is_as_high_as_the_workspace_allows() -> None:
    """Counts the tiles: larger settings make fewer."""
    tiles: dict[int, int] = {}
    for tile_pixels in (16, 64, 1000):
        seen: list[slice] = []

        class Watching(LayerRunner):
            def chunk_slices(self, total: int, size: int) -> Iterator[slice]:
                for tile in super().chunk_slices(total, size):
                    seen.append(tile)  # noqa: B023
                    yield tile

        decoded(VAE, noise(1, 4, 40, 20), TilingSettings(chunk_size=1, tile_pixels=tile_pixels), Watching())
        tiles[tile_pixels] = len(seen)
    layers = tiles[1000]
    assert tiles[16] > tiles[64] > layers
