"""Wan's autoencoders, 2.1 and 2.2, a latent frame at a time in bands.

Core's modules are shown to the pack's tiled autoencoder under diffusers' names; norms, attention and shortcuts stay
core's. Core runs 2.1 two latent frames at a time, which is the same, since the autoencoder is causal in time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import comfy.ldm.wan.vae as wan_21
import comfy.ldm.wan.vae2_2 as wan_22
import torch
from torch import nn

from ....i2v_core.families.wan.tiled import TiledDecoder, TiledEncoder, folded
from ....i2v_core.placement.offload import empty_on_host
from .bands import BandedPass
from .layer_classes import all_plain
from .model import Video, Write
from .resnet import Resnet

_TIMES = 4
"""Frames of the video for each latent frame after the first."""


@dataclass(frozen=True, slots=True)
class _Middle:
    resnets: tuple[Resnet, Resnet]
    attentions: tuple[nn.Module]


@dataclass(frozen=True, slots=True)
class _Up:
    resnets: tuple[Resnet, ...]
    upsampler: nn.Module | None
    avg_shortcut: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class _Down:
    resnets: tuple[Resnet, ...]
    downsampler: nn.Module | None
    avg_shortcut: nn.Module


@dataclass(frozen=True, slots=True)
class _Decoder:
    conv_in: nn.Module
    mid_block: _Middle
    up_blocks: tuple[_Up, ...]
    norm_out: nn.Module
    conv_out: nn.Module


@dataclass(frozen=True, slots=True)
class _Encoder:
    conv_in: nn.Module
    mid_block: _Middle
    down_blocks: tuple[Any, ...]
    norm_out: nn.Module
    conv_out: nn.Module


@dataclass(frozen=True, slots=True)
class _Autoencoder:
    """One of core's two `WanVAE` under the names of diffusers' `AutoencoderKLWan`."""

    encoder: _Encoder
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    decoder: _Decoder


@dataclass(frozen=True, slots=True)
class WanVAE:
    """One of the two autoencoders."""

    name: str
    core: Any
    """Core's module that defines it."""
    side: int
    """Side of the squares of pixels that are channels of one pixel."""
    steady_latent_frames: int | None = 3

    def recognises(self, model: nn.Module) -> bool:
        return type(model) is self.core.WanVAE and all_plain(model, _LAYERS) and _is_as_published(model)

    def pixel_channels(self, model: Any) -> int:
        return model.decoder.head[2].out_channels // self.side**2

    def latent_frames(self, frames: int) -> int:
        return (frames - 1) // _TIMES + 1

    def frames(self, latent_frames: int) -> int:
        return (latent_frames - 1) * _TIMES + 1

    def decode(self, model: nn.Module, latent_1CThw: torch.Tensor, banded: BandedPass, write: Write) -> None:
        decoder = TiledDecoder(_renamed(model), banded.causal_layers(_TIMES))
        end = 0
        for index in range(latent_1CThw.shape[2]):
            frames = slice(end, end + (_TIMES if index else 1))
            end = frames.stop
            latent_1C1hw = latent_1CThw[:, :, index : index + 1].to(banded.device, banded.dtype)

            def write_tile(rows: slice, tile_FCrW: torch.Tensor, frames: slice = frames) -> None:
                higher = slice(self.side * rows.start, self.side * rows.stop)
                write(frames, higher, self._unfolded(tile_FCrW))

            decoder(latent_1C1hw, write_tile)
            banded.on_latent_frame()

    def encode(self, model: nn.Module, video: Video, banded: BandedPass) -> torch.Tensor:
        encoder = TiledEncoder(_renamed(model), banded.causal_layers(_TIMES))
        latent_1CThw: torch.Tensor | None = None
        count = self.latent_frames(video.frames)
        for index in range(count):
            frames = slice(1 + _TIMES * (index - 1), 1 + _TIMES * index) if index else slice(0, 1)
            mean_1C1hw = encoder(folded(video.read(frames), self.side)).chunk(2, dim=1)[0]
            if latent_1CThw is None:
                shape = (*mean_1C1hw.shape[:2], count, *mean_1C1hw.shape[3:])
                latent_1CThw = empty_on_host(shape, mean_1C1hw.dtype, banded.device)
            latent_1CThw[:, :, index : index + 1] = mean_1C1hw
            banded.on_latent_frame()
        assert latent_1CThw is not None
        return latent_1CThw

    def _unfolded(self, tile_FCrW: torch.Tensor) -> torch.Tensor:
        """Pixels (C, F, r, W); the order of folded channels is (C, across, down)."""
        frames, _, rows, width = tile_FCrW.shape
        side = self.side
        squares = tile_FCrW.reshape(frames, -1, side, side, rows, width).permute(1, 0, 4, 3, 5, 2)
        return squares.reshape(-1, frames, side * rows, side * width)


_LAYERS: tuple[type[nn.Module], ...] = (
    *(getattr(wan_21, it) for it in ("WanVAE", "Encoder3d", "Decoder3d", "ResidualBlock", "Resample")),
    *(getattr(wan_22, it) for it in ("WanVAE", "Encoder3d", "Decoder3d", "ResidualBlock", "Resample")),
    *(getattr(wan_22, it) for it in ("Up_ResidualBlock", "Down_ResidualBlock", "DupUp3D", "AvgDown3D")),
    wan_21.AttentionBlock,
    wan_21.CausalConv3d,
    wan_21.RMS_norm,
    wan_21.ops.Conv2d,
)


def _is_as_published(model: Any) -> bool:
    """Whether attention is in the middle only, as in all published weights."""
    attentions = sum(isinstance(it, wan_21.AttentionBlock) for it in model.modules())
    return attentions == sum(isinstance(it.middle[1], wan_21.AttentionBlock) for it in (model.encoder, model.decoder))


def _renamed(model: Any) -> _Autoencoder:
    encoder, decoder = model.encoder, model.decoder
    return _Autoencoder(
        encoder=_Encoder(
            conv_in=encoder.conv1,
            mid_block=_middle(encoder.middle),
            down_blocks=tuple(map(_down, encoder.downsamples)),
            norm_out=encoder.head[0],
            conv_out=encoder.head[2],
        ),
        quant_conv=model.conv1,
        post_quant_conv=model.conv2,
        decoder=_Decoder(
            conv_in=decoder.conv1,
            mid_block=_middle(decoder.middle),
            up_blocks=_ups(decoder.upsamples),
            norm_out=decoder.head[0],
            conv_out=decoder.head[2],
        ),
    )


def _resnet(block: Any) -> Resnet:
    norm1, _, conv1, norm2, _, _, conv2 = block.residual
    return Resnet(norm1, conv1, norm2, conv2, block.shortcut)


def _middle(blocks: Any) -> _Middle:
    first, attention, last = blocks
    return _Middle((_resnet(first), _resnet(last)), (attention,))


def _down(layer: Any) -> Any:
    """A layer of an encoder: 2.1 has residual blocks and resampling in one list, 2.2 a list of lists of these."""
    if isinstance(layer, wan_22.Down_ResidualBlock):
        resnets, sampler = _split(layer.downsamples)
        return _Down(resnets, sampler, layer.avg_shortcut)
    return _resnet(layer) if hasattr(layer, "residual") else layer


def _ups(layers: Iterable[Any]) -> tuple[_Up, ...]:
    """The upsampling blocks of a decoder; in 2.1 a block ends with each resampling."""
    made: list[_Up] = []
    pending: list[Any] = []
    for layer in layers:
        if isinstance(layer, wan_22.Up_ResidualBlock):
            made.append(_Up(*_split(layer.upsamples), layer.avg_shortcut))
            continue
        pending.append(layer)
        if hasattr(layer, "resample"):
            made.append(_Up(*_split(pending)))
            pending = []
    return (*made, _Up(*_split(pending))) if pending else tuple(made)


def _split(layers: Iterable[Any]) -> tuple[tuple[Resnet, ...], nn.Module | None]:
    """The residual blocks, and the resampling that follows them, if any."""
    resnets = tuple(_resnet(it) for it in layers if hasattr(it, "residual"))
    return resnets, next((it for it in layers if hasattr(it, "resample")), None)


VAE_MODELS = (WanVAE("Wan 2.1 VAE", wan_21, side=1), WanVAE("Wan 2.2 VAE", wan_22, side=2))
