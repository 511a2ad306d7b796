"""Wan's autoencoder layer by layer in tiles of rows, a latent frame at a time.

The layers are found by diffusers' names for them; any object that has them under these names will do.

Legend: C latent channels, F frames that one latent frame decodes to, h/w latent size, r rows of a tile, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ...decoding.causal_row_tiles import CausalRowTiledLayers
from ...decoding.feature_map import FeatureMap

# Takes the rows of a tile of the last layer's result, and the tile (F, channels, r, W), which it may overwrite.
_Write: TypeAlias = Callable[[slice, torch.Tensor], None]


def folded(frames_1CFHW: torch.Tensor, side: int) -> torch.Tensor:
    """Return frames with squares of pixels folded into channels, as Wan's autoencoders take them."""
    batch, channels, frames, height, width = frames_1CFHW.shape
    squares = frames_1CFHW.view(batch, channels, frames, height // side, side, width // side, side)
    return squares.permute(0, 1, 6, 4, 2, 3, 5).reshape(batch, -1, frames, height // side, width // side)


class TiledDecoder:
    """Decodes the latent frames of a clip, one at a call, in order."""

    def __init__(self, vae: Any, layers: CausalRowTiledLayers) -> None:
        self._vae, self._layers = vae, layers
        self._first = True

    def __call__(self, latent_1C1hw: torch.Tensor, write: _Write) -> None:
        """Decode a latent frame; `write` gets each tile of its frames, of squares of pixels still folded."""
        layers, decoder = self._layers, self._vae.decoder
        hidden = layers.causal_pointwise(self._vae.post_quant_conv, FeatureMap.view_of(latent_1C1hw[0].transpose(0, 1)))
        hidden = _middle(layers, decoder.mid_block, layers.causal_convolve(decoder.conv_in, hidden))
        for block in decoder.up_blocks:
            hidden = self._up(block, hidden)
        layers.causal_output(decoder.conv_out, hidden, decoder.norm_out, write)
        self._first = False

    def _up(self, block: Any, hidden: FeatureMap) -> FeatureMap:
        """Run a `WanUpBlock`, or a `WanResidualUpBlock`, which adds its upsampled input to its result."""
        layers, source = self._layers, hidden
        shortcut = getattr(block, "avg_shortcut", None)
        for index, resnet in enumerate(block.resnets):
            hidden = layers.causal_resnet(resnet, hidden, keep=index == 0 and shortcut is not None)
        upsampler = block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]
        if upsampler is None:
            return hidden
        # The first frame is not doubled: the temporal convolution starts with the second.
        if upsampler.mode == "upsample3d" and not self._first:
            hidden = layers.causal_convolve(upsampler.time_conv, hidden)
        hidden = layers.upsample(upsampler.resample[1], hidden)
        return (
            hidden if shortcut is None else layers.add_upsampled_shortcut(shortcut, source, hidden, first=self._first)
        )


class TiledEncoder:
    """Encodes the frames of a clip, those of one latent frame at a call, in order."""

    def __init__(self, vae: Any, layers: CausalRowTiledLayers) -> None:
        self._vae, self._layers = vae, layers
        self._first = True

    def __call__(self, folded_1cFhw: torch.Tensor) -> torch.Tensor:
        """Return mean and logarithm of variance (1, 2 C, 1, h, w) of frames whose squares of pixels are folded."""
        layers, encoder = self._layers, self._vae.encoder
        source = FeatureMap.view_of(folded_1cFhw[0].transpose(0, 1))
        hidden = layers.causal_convolve(encoder.conv_in, source)
        for layer in encoder.down_blocks:
            hidden = self._down(layer, hidden)
        hidden = layers.causal_convolve(
            encoder.conv_out, _middle(layers, encoder.mid_block, hidden), norm=encoder.norm_out
        )
        hidden = layers.causal_pointwise(self._vae.quant_conv, hidden)
        self._first = False
        return hidden.read(slice(0, hidden.height)).transpose(0, 1)[None]

    def _down(self, layer: Any, hidden: FeatureMap) -> FeatureMap:
        """Run a `WanResidualBlock` or `WanResample`, or a `WanResidualDownBlock` of these."""
        layers = self._layers
        if hasattr(layer, "avg_shortcut"):
            return self._residual_down(layer, hidden)
        if not hasattr(layer, "resample"):
            return layers.causal_resnet(layer, hidden)
        hidden = layers.downsample(layer.resample[1], hidden)
        if layer.mode != "downsample3d":
            return hidden
        # The first frame is not halved, but kept as the temporal convolution's past.
        if self._first:
            layers.remember(layer.time_conv, hidden)
            return hidden
        return layers.causal_convolve(layer.time_conv, hidden)

    def _residual_down(self, block: Any, source: FeatureMap) -> FeatureMap:
        hidden = source
        for index, resnet in enumerate(block.resnets):
            hidden = self._layers.causal_resnet(resnet, hidden, keep=index == 0)
        if block.downsampler is not None:
            hidden = self._down(block.downsampler, hidden)
        return self._layers.add_downsampled_shortcut(block.avg_shortcut, source, hidden)


def _middle(layers: CausalRowTiledLayers, block: Any, hidden: FeatureMap) -> FeatureMap:
    """Run a `WanMidBlock`."""
    hidden = layers.causal_resnet(block.resnets[0], hidden)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        hidden = layers.causal_resnet(resnet, layers.causal_attention(attention, hidden))
    return hidden
