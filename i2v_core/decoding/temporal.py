"""Tiled AutoencoderKLTemporalDecoder, of Stable Video Diffusion, in tiles of rows that hold all frames.

Every block of its decoder has temporal layers, and some of its normalisations take statistics over frames, height and
width, so only layers that run over all frames give the exact result. Its encoder is that of AutoencoderKL.

Legend: N frames, C latent channels, h/w latent size, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..chunking import LayerRunner
from .feature_map import FeatureMap
from .kl import row_tiled_layers
from .row_tiles import RowTiledLayers
from .settings import TilingSettings


def decode_clip_into(
    vae: Any,
    samples_NChw: torch.Tensor,
    frames_NHW3: torch.Tensor,
    tiling: TilingSettings,
    *,
    runner: LayerRunner,
    on_chunk: Callable[[], None],
) -> None:
    """Decode the latents of one clip on the device as `vae.decode` does, and write the result to `frames_NHW3` on the
    host.
    """
    decoder = vae.decoder
    layers = row_tiled_layers(vae, samples_NChw, tiling, runner, on_chunk)
    hidden = layers.convolve(decoder.conv_in, FeatureMap.view_of(samples_NChw))
    hidden = _middle(layers, decoder.mid_block, hidden)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _resnet(layers, resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = layers.upsample(upsampler.conv, hidden)
    hidden = layers.convolve(decoder.conv_out, hidden, norm=decoder.conv_norm_out)
    layers.write_temporal_output(decoder.time_conv_out, hidden, frames_NHW3)


def _middle(layers: RowTiledLayers, block: Any, hidden: FeatureMap) -> FeatureMap:
    """Run a `MidBlockTemporalDecoder`; as its own forward, it skips ResNets beyond the number of attentions."""
    hidden = _resnet(layers, block.resnets[0], hidden)
    for resnet, attention in zip(block.resnets[1:], block.attentions, strict=False):
        hidden = _resnet(layers, resnet, layers.attention(attention, hidden))
    return hidden


def _resnet(layers: RowTiledLayers, block: Any, hidden: FeatureMap) -> FeatureMap:
    """Run a `SpatioTemporalResBlock` without embedding."""
    hidden = layers.resnet(block.spatial_res_block, hidden)
    layer = block.temporal_res_block
    inner = layers.temporal_convolve(layer.conv1, hidden, layer.norm1)
    return layers.temporal_convolve(layer.conv2, inner, layer.norm2, add_to=hidden, mixer=block.time_mixer)
