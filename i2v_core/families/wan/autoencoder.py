"""AutoencoderKLWan, a latent frame at a time: by its own forward with its cache, or layer by layer in tiles of rows.

Wan et al., "Wan: Open and Advanced Large-Scale Video Generative Models", 2025. The autoencoder is causal in time: the
first latent frame decodes to one frame of the video, each further one to as many as it compresses in time. Its own
`decode` also runs one latent frame at a time, but keeps all decoded frames on the device.

Legend: C latent channels, T latent frames, h/w latent size, H/W pixel size, F frames that one latent frame decodes to,
p side of the squares of pixels that are channels of one pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from ...chunking import ChunkSettings, LayerRunner
from ...chunking.execution import Execution
from ...decoding.causal_row_tiles import CausalRowTiledLayers
from ...decoding.feature_map import FeatureMaps
from ...decoding.settings import TilingSettings
from ...placement.offload import empty_on_host
from .tiled import TiledDecoder, TiledEncoder, folded

# Takes one latent frame (1, C, 1, h, w) on the device, and the frames (F, H, W, 3) in host memory to write to.
_Decoder: TypeAlias = Callable[[torch.Tensor, torch.Tensor], None]
# Takes frames in -1…1 (1, 3, F, H, W) on the device; returns mean and logarithm of variance (1, 2 C, 1, h, w).
_Encoder: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WanAutoencoder:
    """An AutoencoderKLWan that is ready to run. `runner` loads its weights if it runs layer by layer."""

    vae: Any
    device: torch.device
    dtype: torch.dtype
    tiling: TilingSettings
    runner: LayerRunner
    on_chunk: Callable[[], None]

    def decode(self, latents_1CThw: torch.Tensor, first_frame: int) -> Iterator[torch.Tensor]:
        """Yield frames (F, H, W, 3) in -1…1, in fp32, in host memory, one latent frame's at a time, from `first_frame`
        on.

        Latent frames before that are decoded too, since every frame depends on all before it.
        """
        factor, times = self.vae.config.scale_factor_spatial, self.vae.config.scale_factor_temporal
        height, width = (factor * side for side in latents_1CThw.shape[3:])
        decode = _TiledDecoder(self) if self.tiling.by_layer else _PlainDecoder(self.vae)
        end = 0
        for index in range(latents_1CThw.shape[2]):
            self.on_chunk()
            start, end = end, end + (times if index else 1)
            latent_1C1hw = latents_1CThw[:, :, index : index + 1].to(self.device, self.dtype)
            frames_FHW3 = empty_on_host((end - start, height, width, 3), torch.float32, self.device)
            decode(latent_1C1hw, frames_FHW3)
            del latent_1C1hw
            if end > first_frame:
                yield frames_FHW3[max(0, first_frame - start) :]

    def encode_mode(self, picture_13HW: torch.Tensor, frames: int) -> torch.Tensor:
        """Return `vae.encode(video).latent_dist.mode()` (1, C, T, h, w), in fp32, in host memory.

        The video of `frames` frames is the picture in -1…1, in host memory, followed by zeros. It is encoded a few
        frames at a time, as the autoencoder's own `encode` does.
        """
        factor, times = self.vae.config.scale_factor_spatial, self.vae.config.scale_factor_temporal
        height, width = picture_13HW.shape[2:]
        encode = _TiledEncoder(self) if self.tiling.by_layer else _PlainEncoder(self.vae)
        count = (frames - 1) // times + 1
        shape = (1, self.vae.config.z_dim, count, height // factor, width // factor)
        latents_1CThw = empty_on_host(shape, torch.float32, self.device)
        for index in range(count):
            self.on_chunk()
            frames_13FHW = torch.zeros(1, 3, times if index else 1, height, width, device=self.device, dtype=self.dtype)
            if index == 0:
                frames_13FHW.copy_(picture_13HW[:, :, None])
            latents_1CThw[:, :, index] = encode(frames_13FHW).chunk(2, dim=1)[0][:, :, 0]
        return latents_1CThw

    def tiled_layers(self, channels: int) -> CausalRowTiledLayers:
        """Return the tiled layers for one pass; `channels` is the largest width at full resolution."""
        frame_bytes = 4 * channels * self.dtype.itemsize
        workspace_bytes = self.tiling.tile_pixels**2 * frame_bytes * self.vae.config.scale_factor_temporal
        execution = Execution(
            settings=ChunkSettings(workspace_bytes=workspace_bytes),
            runner=self.runner,
            on_chunk=self.on_chunk,
            num_frames=self.vae.config.scale_factor_temporal,
        )
        return CausalRowTiledLayers(execution, FeatureMaps(self.device, self.dtype, self.tiling.maps_bytes, groups=0))


class _PlainDecoder:
    """Runs the model's own decoder with its own cache."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._cache = _empty_cache(vae.decoder)
        self._first = True

    def __call__(self, latent_1C1hw: torch.Tensor, frames_FHW3: torch.Tensor) -> None:
        vae = self._vae
        latent_1C1hw = vae.post_quant_conv(latent_1C1hw)
        decoded = vae.decoder(latent_1C1hw, feat_cache=self._cache, feat_idx=[0], first_chunk=self._first)
        self._first = False
        _write_frames(vae, decoded[0].transpose(0, 1), frames_FHW3)


class _PlainEncoder:
    """Runs the model's own encoder with its own cache."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._cache = _empty_cache(vae.encoder)

    def __call__(self, frames_13FHW: torch.Tensor) -> torch.Tensor:
        vae = self._vae
        frames_13FHW = _folded(vae, frames_13FHW)
        return vae.quant_conv(vae.encoder(frames_13FHW, feat_cache=self._cache, feat_idx=[0]))


class _TiledDecoder:
    """Runs the decoder's layers in tiles."""

    def __init__(self, run: WanAutoencoder) -> None:
        self._vae = run.vae
        self._decode = TiledDecoder(run.vae, run.tiled_layers(run.vae.decoder.conv_out.in_channels))

    def __call__(self, latent_1C1hw: torch.Tensor, frames_FHW3: torch.Tensor) -> None:
        side = self._vae.config.patch_size or 1

        def write(rows: slice, tile_FCrW: torch.Tensor) -> None:
            _write_frames(self._vae, tile_FCrW, frames_FHW3[:, side * rows.start : side * rows.stop])

        self._decode(latent_1C1hw, write)


class _TiledEncoder:
    """Runs the encoder's layers in tiles."""

    def __init__(self, run: WanAutoencoder) -> None:
        self._vae = run.vae
        self._encode = TiledEncoder(run.vae, run.tiled_layers(run.vae.encoder.conv_in.out_channels))

    def __call__(self, frames_13FHW: torch.Tensor) -> torch.Tensor:
        return self._encode(_folded(self._vae, frames_13FHW))


def _empty_cache(module: nn.Module) -> list[Any]:
    """Return a cache with an entry for each causal convolution, which the autoencoder's own forward fills and reads."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return [None for part in module.modules() if isinstance(part, WanCausalConv3d)]


def _write_frames(vae: Any, decoded_FCrW: torch.Tensor, frames_FrW3: torch.Tensor) -> None:
    """Clamp the last layer's result to -1…1, in place, and write it to frames in host memory, squares unfolded."""
    side = vae.config.patch_size or 1
    decoded_FCrW.clamp_(-1, 1)
    frames, _, height, width = decoded_FCrW.shape
    # The autoencoder's order of channels is (3, p across, p down).
    squares = decoded_FCrW.reshape(frames, 3, side, side, height, width).permute(0, 4, 3, 5, 2, 1)
    frames_FrW3.view(frames, height, side, width, side, 3).copy_(squares)


def _folded(vae: Any, frames_13FHW: torch.Tensor) -> torch.Tensor:
    return folded(frames_13FHW, vae.config.patch_size or 1)
