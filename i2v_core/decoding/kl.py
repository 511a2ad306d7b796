"""Tiled AutoencoderKL, the image autoencoder of I2VGen-XL and Stable Diffusion.

Legend: N frames, C latent channels, h/w latent size, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..chunking import ChunkSettings, LayerRunner
from ..chunking.execution import Execution
from .feature_map import FeatureMap, FeatureMaps
from .row_tiles import RowTiledLayers
from .settings import TilingSettings

# Groups of the normalisations in models whose config does not say.
_GROUPS = 32


def supports_row_tiles(config: Mapping[str, Any]) -> bool:
    """Whether an AutoencoderKL of this config has only layers that can be tiled."""
    kinds = {*config.get("up_block_types", ()), *config.get("down_block_types", ())}
    return kinds <= {"UpDecoderBlock2D", "DownEncoderBlock2D"} and config.get("act_fn", "silu") in ("silu", "swish")


def decode_into(
    vae: Any,
    samples_NChw: torch.Tensor,
    frames_NHW3: torch.Tensor,
    tiling: TilingSettings,
    *,
    runner: LayerRunner,
    on_chunk: Callable[[], None],
) -> None:
    """Decode latents on the device as `vae.decode` does, and write the result to `frames_NHW3` in host memory."""
    decoder = vae.decoder
    layers = row_tiled_layers(vae, samples_NChw, tiling, runner, on_chunk)
    hidden = FeatureMap.view_of(samples_NChw)
    if vae.post_quant_conv is not None:
        hidden = layers.pointwise(vae.post_quant_conv, hidden)
    hidden = _middle(layers, decoder.mid_block, layers.convolve(decoder.conv_in, hidden))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = layers.resnet(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = layers.upsample(upsampler.conv, hidden)
    layers.write_output(decoder.conv_out, hidden, decoder.conv_norm_out, frames_NHW3)


def encode_mode(
    vae: Any,
    pixels_N3HW: torch.Tensor,
    tiling: TilingSettings,
    *,
    runner: LayerRunner,
    on_chunk: Callable[[], None],
) -> torch.Tensor:
    """Return `vae.encode(pixels).latent_dist.mode()` (N, C, h, w) for pictures in -1…1 on the device."""
    encoder = vae.encoder
    layers = row_tiled_layers(vae, pixels_N3HW, tiling, runner, on_chunk)
    hidden = layers.convolve(encoder.conv_in, FeatureMap.view_of(pixels_N3HW))
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden = layers.resnet(resnet, hidden)
        for downsampler in block.downsamplers or ():
            hidden = layers.downsample(downsampler.conv, hidden)
    hidden = layers.convolve(encoder.conv_out, _middle(layers, encoder.mid_block, hidden), norm=encoder.conv_norm_out)
    if vae.quant_conv is not None:
        hidden = layers.pointwise(vae.quant_conv, hidden)
    return hidden.read(slice(0, hidden.height)).chunk(2, dim=1)[0].contiguous()


def _middle(layers: RowTiledLayers, block: Any, hidden: FeatureMap) -> FeatureMap:
    """Run a `UNetMidBlock2D`."""
    hidden = layers.resnet(block.resnets[0], hidden)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            hidden = layers.attention(attention, hidden)
        hidden = layers.resnet(resnet, hidden)
    return hidden


def row_tiled_layers(
    vae: Any, source: torch.Tensor, tiling: TilingSettings, runner: LayerRunner, on_chunk: Callable[[], None]
) -> RowTiledLayers:
    """Return the tiled layers for one pass of `source` (N, ...) through an autoencoder."""
    # Bytes a pixel that the widest layer at full resolution reads and writes, and those of a copy of both.
    pixel_bytes = 4 * vae.config.block_out_channels[min(1, len(vae.config.block_out_channels) - 1)] * source.itemsize
    execution = Execution(
        settings=ChunkSettings(workspace_bytes=tiling.tile_pixels**2 * pixel_bytes),
        runner=runner,
        on_chunk=on_chunk,
        num_frames=len(source),
    )
    groups = getattr(vae.config, "norm_num_groups", _GROUPS)
    return RowTiledLayers(execution, FeatureMaps(source.device, source.dtype, tiling.maps_bytes, groups))
