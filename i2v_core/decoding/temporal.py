"""AutoencoderKLTemporalDecoder (of Stable Video Diffusion) in bands of rows that hold all frames.

Its decoder looks along time in every block, and some of its normalisations take statistics over frames, height and
width: so nothing less than a layer over all frames can be exact. Its encoder is that of AutoencoderKL.

Legend: N frames, C latent channels, h/w latent size, H/W pixel size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..chunking import LayerRunner
from .bands import RowTiledLayers
from .feature_map import FeatureMap
from .kl import bands_of
from .pieces import TilingSettings


def decode_clip_into(
    vae: Any,
    samples_NChw: torch.Tensor,
    frames_NHW3: torch.Tensor,
    pieces: TilingSettings,
    *,
    runner: LayerRunner,
    on_chunk: Callable[[], None],
) -> None:
    """What `vae.decode` makes of the latents of one clip on the device, written to `frames_NHW3` in host memory."""
    decoder = vae.decoder
    bands = bands_of(vae, samples_NChw, pieces, runner, on_chunk)
    hidden = bands.convolve(decoder.conv_in, FeatureMap.over(samples_NChw))
    hidden = _middle(bands, decoder.mid_block, hidden)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _resnet(bands, resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = bands.upsample(upsampler.conv, hidden)
    hidden = bands.convolve(decoder.conv_out, hidden, norm=decoder.conv_norm_out)
    bands.result_along_time(decoder.time_conv_out, hidden, frames_NHW3)


def _middle(bands: RowTiledLayers, block: Any, hidden: FeatureMap) -> FeatureMap:
    """A `MidBlockTemporalDecoder`, which may have more of one than of the other, and leaves them out."""
    hidden = _resnet(bands, block.resnets[0], hidden)
    for resnet, attention in zip(block.resnets[1:], block.attentions, strict=False):
        hidden = _resnet(bands, resnet, bands.attention(attention, hidden))
    return hidden


def _resnet(bands: RowTiledLayers, block: Any, hidden: FeatureMap) -> FeatureMap:
    """A `SpatioTemporalResBlock` without embedding."""
    hidden = bands.resnet(block.spatial_res_block, hidden)
    layer = block.temporal_res_block
    inner = bands.along_time(layer.conv1, hidden, layer.norm1)
    return bands.along_time(layer.conv2, inner, layer.norm2, onto=hidden, mixer=block.time_mixer)
