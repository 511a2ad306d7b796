"""AutoencoderKL (the image autoencoder of I2VGen-XL and Stable Diffusion) in bands of rows.

Legend: N frames, C latent channels, h/w latent size, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..chunking import ChunkSettings, LayerRunner
from ..chunking.execution import Execution
from .bands import RowTiledLayers
from .feature_map import FeatureMap, FeatureMaps
from .pieces import TilingSettings

# Of the normalisations in models whose config does not say.
_GROUPS = 32


def runs_in_bands(config: Mapping[str, Any]) -> bool:
    """Whether an AutoencoderKL of this config is made of the layers that are known here."""
    kinds = {*config.get("up_block_types", ()), *config.get("down_block_types", ())}
    return kinds <= {"UpDecoderBlock2D", "DownEncoderBlock2D"} and config.get("act_fn", "silu") in ("silu", "swish")


def decode_into(
    vae: Any,
    samples_NChw: torch.Tensor,
    frames_NHW3: torch.Tensor,
    pieces: TilingSettings,
    *,
    runner: LayerRunner,
    on_chunk: Callable[[], None],
) -> None:
    """What `vae.decode` makes of latents on the device, written band by band to `frames_NHW3` in host memory."""
    decoder = vae.decoder
    bands = bands_of(vae, samples_NChw, pieces, runner, on_chunk)
    hidden = FeatureMap.over(samples_NChw)
    if vae.post_quant_conv is not None:
        hidden = bands.pointwise(vae.post_quant_conv, hidden)
    hidden = _middle(bands, decoder.mid_block, bands.convolve(decoder.conv_in, hidden))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = bands.resnet(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = bands.upsample(upsampler.conv, hidden)
    bands.result(decoder.conv_out, hidden, decoder.conv_norm_out, frames_NHW3)


def encode_mode(
    vae: Any,
    pixels_N3HW: torch.Tensor,
    pieces: TilingSettings,
    *,
    runner: LayerRunner,
    on_chunk: Callable[[], None],
) -> torch.Tensor:
    """`vae.encode(pixels).latent_dist.mode()` (N, C, h, w) of pictures in -1…1 on the device."""
    encoder = vae.encoder
    bands = bands_of(vae, pixels_N3HW, pieces, runner, on_chunk)
    hidden = bands.convolve(encoder.conv_in, FeatureMap.over(pixels_N3HW))
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden = bands.resnet(resnet, hidden)
        for downsampler in block.downsamplers or ():
            hidden = bands.downsample(downsampler.conv, hidden)
    hidden = bands.convolve(encoder.conv_out, _middle(bands, encoder.mid_block, hidden), norm=encoder.conv_norm_out)
    if vae.quant_conv is not None:
        hidden = bands.pointwise(vae.quant_conv, hidden)
    return hidden.read(slice(0, hidden.height)).chunk(2, dim=1)[0].contiguous()


def _middle(bands: RowTiledLayers, block: Any, hidden: FeatureMap) -> FeatureMap:
    """A `UNetMidBlock2D`."""
    hidden = bands.resnet(block.resnets[0], hidden)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            hidden = bands.attention(attention, hidden)
        hidden = bands.resnet(resnet, hidden)
    return hidden


def bands_of(
    vae: Any, source: torch.Tensor, pieces: TilingSettings, runner: LayerRunner, on_chunk: Callable[[], None]
) -> RowTiledLayers:
    """The layers for one pass of `source` (N, ...) through an autoencoder."""
    # What the widest layer at full resolution reads and makes for a pixel, and copies of both.
    pixel_bytes = 4 * vae.config.block_out_channels[min(1, len(vae.config.block_out_channels) - 1)] * source.itemsize
    execution = Execution(
        settings=ChunkSettings(workspace_bytes=pieces.tile_pixels**2 * pixel_bytes),
        runner=runner,
        on_chunk=on_chunk,
        num_frames=len(source),
    )
    groups = getattr(vae.config, "norm_num_groups", _GROUPS)
    return RowTiledLayers(execution, FeatureMaps(source.device, source.dtype, pieces.maps_bytes, groups))
