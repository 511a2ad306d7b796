"""HunyuanVideo 1.5's autoencoder: the middle over the whole latent, the rest a latent frame at a time in bands.

Core runs two latent frames at a time, which is the same, since what lies outside of the middle is causal in time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.ldm.hunyuan_video.vae_refiner as core
import comfy.ldm.models.autoencoder as engine
import torch
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, CarriedConv3d, ResnetBlock
from torch import nn

from ....i2v_core.decoding.feature_map import FeatureMap
from ....i2v_core.placement.offload import empty_on_host
from .bands import BandedPass
from .hunyuan_layers import HunyuanLayers
from .layer_classes import all_plain
from .model import Video, Write
from .resnet import Resnet

_TIMES = 4
"""Frames of the video for each latent frame after the first."""
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Module,  # core's stages
    engine.AutoencodingEngine,
    engine.EmptyRegularizer,
    engine.DiagonalGaussianRegularizer,
    *(core.Encoder, core.Decoder, core.UpSmpl, core.DnSmpl, core.RMS_norm),
    *(ResnetBlock, AttnBlock, CarriedConv3d, core.ops.Conv3d, core.ops.Linear),
)


class HunyuanVideo15VAE:
    name = "HunyuanVideo 1.5 VAE"
    steady_latent_frames: int | None = None

    def recognises(self, model: Any) -> bool:
        return (
            type(model) is engine.AutoencodingEngine
            and type(model.decoder) is core.Decoder
            and model.decoder.refiner_vae
            and model.encoder.ffactor_temporal == _TIMES
            and all_plain(model, _LAYERS)
        )

    def pixel_channels(self, model: Any) -> int:
        return model.decoder.conv_out.conv.out_channels

    def latent_frames(self, frames: int) -> int:
        return (frames - 1) // _TIMES + 1

    def frames(self, latent_frames: int) -> int:
        return (latent_frames - 1) * _TIMES + 1

    def decode(self, model: Any, latent_1CThw: torch.Tensor, banded: BandedPass, write: Write) -> None:
        decoder, layers = model.decoder, _layers(banded)
        latent = FeatureMap.view_of(latent_1CThw.to(banded.device, banded.dtype)[0].transpose(0, 1))
        middle = _middle(_layers(banded), decoder.mid, _layers(banded).widened(decoder.conv_in.conv, latent))
        for index in _latent_frames(banded, latent.frames):
            hidden, first = middle.part(slice(index, index + 1)), index == 0
            frames = slice(0, 1) if first else slice(self.frames(index), self.frames(index + 1))
            for stage in decoder.up:
                hidden = _resnets(layers, stage, hidden)
                if hasattr(stage, "upsample"):
                    hidden = layers.upsampled(stage.upsample, hidden, first=first)

            def write_tile(rows: slice, tile_FCrW: torch.Tensor, frames: slice = frames) -> None:
                write(frames, rows, tile_FCrW.transpose(0, 1))

            layers.causal_output(decoder.conv_out.conv, hidden, decoder.norm_out, write_tile)
            banded.on_latent_frame()

    def encode(self, model: Any, video: Video, banded: BandedPass) -> torch.Tensor:
        encoder, layers = model.encoder, _layers(banded)
        collected: FeatureMap | None = None
        for index in _latent_frames(banded, self.latent_frames(video.frames)):
            first = index == 0
            frames = slice(0, 1) if first else slice(self.frames(index), self.frames(index + 1))
            pixels = FeatureMap.view_of(video.read(frames)[0].transpose(0, 1))
            hidden = layers.causal_convolve(encoder.conv_in.conv, pixels)
            for stage in encoder.down:
                hidden = _resnets(layers, stage, hidden)
                if hasattr(stage, "downsample"):
                    hidden = layers.downsampled(stage.downsample, hidden, first=first)
            if collected is None:
                count = self.latent_frames(video.frames)
                collected = layers.new_map(count, hidden.channels, hidden.height, hidden.width)
            layers.copy(hidden, collected.part(slice(index, index + 1)))
            banded.on_latent_frame()
        assert collected is not None
        del layers
        middle = _middle(_layers(banded), encoder.mid, collected)
        made = _layers(banded).narrowed(encoder.conv_out.conv, middle, encoder.norm_out)
        moments_1CThw = made.read(slice(None)).transpose(0, 1)[None]
        latent_1CThw = model.regularization(encoder.regul(moments_1CThw)[0])[0]
        return empty_on_host(tuple(latent_1CThw.shape), latent_1CThw.dtype, banded.device).copy_(latent_1CThw)


VAE_MODELS = (HunyuanVideo15VAE(),)


def _layers(banded: BandedPass) -> HunyuanLayers:
    return banded.causal_layers(_TIMES, replicates=True, kind=HunyuanLayers)


def _latent_frames(banded: BandedPass, count: int) -> Iterator[int]:
    """Latent frames in order; those that need the same memory once, where the runner only traces."""
    return (it.start for it in banded.runner.chunk_slices(count, 1))


def _middle(layers: HunyuanLayers, middle: Any, hidden: FeatureMap) -> FeatureMap:
    hidden = layers.causal_resnet(_resnet(middle.block_1), hidden)
    hidden = layers.attention_over_clip(middle.attn_1, hidden)
    return layers.causal_resnet(_resnet(middle.block_2), hidden)


def _resnets(layers: HunyuanLayers, stage: Any, hidden: FeatureMap) -> FeatureMap:
    for block in stage.block:
        hidden = layers.causal_resnet(_resnet(block), hidden)
    return hidden


def _resnet(block: Any) -> Resnet:
    shortcut = block.nin_shortcut.conv if hasattr(block, "nin_shortcut") else nn.Identity()
    return Resnet(block.norm1, block.conv1.conv, block.norm2, block.conv2.conv, shortcut)
