"""Layers of an autoencoder, run over tiles of rows; a convolution reads a tile with its halo of adjacent rows.

Group normalisations use the statistics of the full feature map, which are gathered while it is written. So the result
is exact, tiles need no blending, and no row is computed twice.

Legend: N frames, C channels, r rows of a tile, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..chunking.execution import Execution, LayerCall
from ..chunking.spatio_temporal import temporal_share
from . import workspace
from .feature_map import FeatureMap, FeatureMaps
from .workspace import Workspace

# Group normalisation with known statistics: scale and shift (N, C, 1, 1) in fp32.
Affine = tuple[torch.Tensor, torch.Tensor]

# Fewest rows of a tile, for one frame and for several: smaller tiles would read and normalise most rows twice.
_MIN_ROWS, _MIN_ROWS_OF_CLIP = 8, 2


class RowTiledLayers:
    """Layers of one pass through an autoencoder, tiled to fit the execution's workspace.

    If the execution's runner is `shape_only`, no layer computes, and only the feature maps are allocated.

    Example: a block that doubles the size of a picture.

        layers = RowTiledLayers(execution, FeatureMaps(device, dtype, limit_bytes=None, groups=32))
        hidden = layers.convolve(vae.decoder.conv_in, FeatureMap.view_of(latents))
        hidden = layers.resnet(block.resnets[0], hidden)
        hidden = layers.upsample(block.upsamplers[0].conv, hidden)
    """

    def __init__(self, execution: Execution, maps: FeatureMaps) -> None:
        self._execution, self._maps = execution, maps
        self._shape_only = execution.runner.shape_only

    def resnet(self, block: Any, source: FeatureMap) -> FeatureMap:
        """Run a `ResnetBlock2D` without embedding, in place unless it has a shortcut convolution."""
        hidden = self.convolve(block.conv1, source, norm=block.norm1)
        base = source if block.conv_shortcut is None else self.pointwise(block.conv_shortcut, source)
        return self.convolve(block.conv2, hidden, norm=block.norm2, add_to=base)

    def convolve(
        self, conv: Any, source: FeatureMap, *, norm: nn.GroupNorm | None = None, add_to: FeatureMap | None = None
    ) -> FeatureMap:
        """Run a 3×3 convolution, after normalisation and SiLU where `norm` is given.

        If `add_to` is given, the result is added to it, in place.
        """
        if add_to is None:
            target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)
        else:
            target = add_to.reset()
        modules = (conv,) if norm is None else (norm, conv)
        usage = workspace.convolution(source, target, added=add_to is not None)
        with self._layer(usage, *modules, height=target.height) as tiles:
            affine = None if norm is None else self._affine(source, norm)
            for rows in tiles:
                tile = functional.conv2d(_with_halo(source, rows, affine), conv.weight, conv.bias, padding=(0, 1))
                if add_to is not None:
                    tile += add_to.read(rows)
                target.write(rows, tile)
                del tile  # or it would be alive beside the next one's input
        return target

    def pointwise(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """Run a 1×1 convolution."""
        target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)

        def run(rows: slice) -> None:
            target.write(rows, functional.conv2d(source.read(rows), conv.weight, conv.bias))

        self._run_tiles(run, workspace.pointwise(source, target), conv, height=target.height)
        return target

    def upsample(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """Double height and width by repeating pixels, then run a 3×3 convolution."""
        target = self._maps.new(source.frames, conv.out_channels, 2 * source.height, 2 * source.width)

        def run(rows: slice) -> None:
            tile = functional.conv2d(_upsampled_with_halo(source, rows), conv.weight, conv.bias, padding=(0, 1))
            target.write(rows, tile)

        self._run_tiles(run, workspace.upsample(source, target), conv, height=target.height)
        return target

    def downsample(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """Run a 3×3 convolution with a stride of two, padded at the right and at the bottom."""
        target = self._maps.new(source.frames, conv.out_channels, source.height // 2, source.width // 2)

        def run(rows: slice) -> None:
            target.write(rows, functional.conv2d(_downsample_input(source, rows), conv.weight, conv.bias, stride=2))

        self._run_tiles(run, workspace.downsample(source, target), conv, height=target.height)
        return target

    def temporal_convolve(
        self,
        conv: Any,
        source: FeatureMap,
        norm: nn.GroupNorm,
        *,
        add_to: FeatureMap | None = None,
        mixer: Any = None,
    ) -> FeatureMap:
        """Run normalisation over all frames and SiLU, then a convolution over three frames of each pixel.

        If `add_to` is given, the result is added to it, in place, with the weight that `mixer` gives it.
        """
        target = (
            self._maps.new(source.frames, conv.out_channels, source.height, source.width) if add_to is None else add_to
        )
        usage = workspace.temporal_convolve(source, target, added=add_to is not None)
        modules = (norm, conv) if mixer is None else (norm, conv, mixer)
        with self._layer(usage, *modules, height=target.height) as tiles:
            affine = None if self._shape_only else source.moments.pooled().scale_and_shift(norm)
            target.reset()
            for rows in tiles:
                tile = _temporal_convolution(conv, source, rows, affine)
                if add_to is not None:
                    tile.mul_(temporal_share(mixer, tile.dtype)).add_(add_to.read(rows))
                target.write(rows, tile)
                del tile
        return target

    def attention(self, layer: nn.Module, source: FeatureMap) -> FeatureMap:
        """Run a diffusers `Attention` with its norm and residual, in place, on untiled frames: each pixel attends to
        all.
        """
        execution, frame_bytes = self._execution, workspace.attention(source)
        with execution.layer(
            "attention", layer, unit="frame", total=source.frames, unit_bytes=frame_bytes, result_excluded=True
        ) as call:
            result, rows = source.reset(), slice(0, source.height)
            for frames in () if self._shape_only else execution.chunks(call):
                attended = layer(source.read(rows, frames).contiguous())
                result.write(rows, attended, frames)
                del attended
        return source

    def write_output(self, conv: Any, source: FeatureMap, norm: nn.GroupNorm, target_NHWC: torch.Tensor) -> None:
        """Run the last normalisation and convolution, and write the result to a tensor in host memory."""
        usage = workspace.output(source, conv.out_channels)
        with self._layer(usage, norm, conv, height=source.height) as tiles:
            affine = self._affine(source, norm)
            for rows in tiles:
                tile = functional.conv2d(_with_halo(source, rows, affine), conv.weight, conv.bias, padding=(0, 1))
                target_NHWC[:, rows] = tile.permute(0, 2, 3, 1)
                del tile

    def write_temporal_output(self, conv: Any, source: FeatureMap, target_NHWC: torch.Tensor) -> None:
        """Run a last convolution over three frames of each pixel, and write the result to a tensor in host memory."""
        usage = workspace.temporal_output(source, conv.out_channels)
        with self._layer(usage, conv, height=source.height) as tiles:
            for rows in tiles:
                tile = _temporal_convolution(conv, source, rows, None)
                target_NHWC[:, rows] = tile.permute(0, 2, 3, 1)
                del tile

    def _affine(self, source: FeatureMap, norm: nn.GroupNorm) -> Affine | None:
        """Return the scale and the shift with which `norm` normalises a map; None for a shape-only run."""
        if self._shape_only:
            return None
        scale, shift = source.moments.scale_and_shift(norm)
        return scale[:, :, None, None], shift[:, :, None, None]

    def _run_tiles(self, run: Callable[[slice], None], usage: Workspace, *modules: nn.Module, height: int) -> None:
        """Run a layer call, by `run` for the rows of each tile."""
        with self._layer(usage, *modules, height=height) as tiles:
            for rows in tiles:
                self._execution.runner.run_chunk(run, rows)

    @contextmanager
    def _layer(self, usage: Workspace, *modules: nn.Module, height: int) -> Generator[Iterator[slice]]:
        """Run a layer call within the context; yields its tiles, of about equally many rows that fit its workspace."""
        min_rows = _MIN_ROWS if self._execution.num_frames == 1 else _MIN_ROWS_OF_CLIP
        layer = _TiledLayer(modules=modules, height=height, usage=usage, min_rows=min_rows)
        with self._execution.enter(layer.call_within) as call:
            yield iter(()) if self._shape_only else self._execution.chunks(call)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TiledLayer:
    """A layer call whose tile height is still to be chosen: `height` rows in tiles of at least `min_rows`."""

    modules: tuple[nn.Module, ...]
    height: int
    usage: Workspace
    min_rows: int

    def call_within(self, limit_bytes: int) -> LayerCall:
        """Return the call, tiled for a workspace of `limit_bytes`."""
        fitting = max(self.min_rows, self.usage.rows_within(limit_bytes))
        rows = -(-self.height // -(-self.height // min(fitting, self.height)))
        return LayerCall(
            kind="row_tile",
            unit="row",
            modules=self.modules,
            total=self.height,
            chunk_size=rows,
            unchunked=False,
            workspace_bytes=self.usage.size_bytes(rows),
            result_excluded=True,  # it is written to a map that was allocated before
            limit_bytes=limit_bytes,
            with_limit=self.call_within,
        )


def _temporal_convolution(conv: Any, source: FeatureMap, rows: slice, affine: Affine | None) -> torch.Tensor:
    """Return the convolution (N, C, r, W) over three frames of a tile, after normalisation and SiLU if `affine` is
    given.
    """
    clip_1CNrW = _clip(source, rows, affine)
    return functional.conv3d(clip_1CNrW, conv.weight, conv.bias, padding=(1, 0, 0))[0].transpose(0, 1)


def _clip(source: FeatureMap, rows: slice, affine: Affine | None) -> torch.Tensor:
    """Return a tile as one clip (1, C, N, r, W), after normalisation and SiLU if `affine` is given."""
    tile_NCrW = source.read(rows)
    clip_CNrW = tile_NCrW.new_empty(tile_NCrW.transpose(0, 1).shape)
    if affine is None:
        clip_CNrW.copy_(tile_NCrW.transpose(0, 1))
    else:
        scale_1C11, shift_1C11 = (it[:, :, None, None] for it in affine)
        torch.addcmul(shift_1C11, tile_NCrW, scale_1C11, out=clip_CNrW.transpose(0, 1))
        functional.silu(clip_CNrW, inplace=True)
    return clip_CNrW[None]


def _with_halo(source: FeatureMap, rows: slice, affine: Affine | None) -> torch.Tensor:
    """Return a tile with its halo (N, C, r + 2, W), normalised, with zeros outside of the map."""
    inside = slice(max(rows.start - 1, 0), min(rows.stop + 1, source.height))
    tile = source.read(inside)
    padded, interior = _zero_padded(tile, rows.stop - rows.start + 2, inside.start - rows.start + 1, tile.shape[-1])
    if affine is None:
        interior.copy_(tile)
        return padded
    scale, shift = affine
    torch.addcmul(shift, tile, scale, out=interior)  # in fp32, rounded once
    functional.silu(interior, inplace=True)
    return padded


def _upsampled_with_halo(source: FeatureMap, rows: slice) -> torch.Tensor:
    """Return a tile with its halo (N, C, r + 2, 2 W) of the map that has four pixels for each of `source`."""
    inside = slice(max(rows.start - 1, 0), min(rows.stop + 1, 2 * source.height))
    needed = slice(inside.start // 2, (inside.stop + 1) // 2)
    source_rows = torch.arange(inside.start, inside.stop, device=source.device) // 2 - needed.start
    tile = source.read(needed).index_select(2, source_rows)
    width = 2 * source.width
    padded, interior = _zero_padded(tile, rows.stop - rows.start + 2, inside.start - rows.start + 1, width)
    interior[..., 0::2] = tile
    interior[..., 1::2] = tile
    return padded


def _downsample_input(source: FeatureMap, rows: slice) -> torch.Tensor:
    """Return the rows (N, C, 2 r + 1, W + 1) that a stride of two reads for a tile, with a column of zeros at the
    right.
    """
    inside = slice(2 * rows.start, min(2 * rows.stop + 1, source.height))
    tile = source.read(inside)
    padded, interior = _zero_padded(tile, 2 * (rows.stop - rows.start) + 1, 0, source.width + 1)
    padded[..., -1].zero_()
    interior[..., :-1] = tile
    return padded


def _zero_padded(tile: torch.Tensor, height: int, above: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a new tensor (N, C, height, width), zero above and below, and its part that is to hold the tile."""
    padded = tile.new_empty(*tile.shape[:2], height, width)
    below = above + tile.shape[2]
    padded[:, :, :above].zero_()
    padded[:, :, below:].zero_()
    return padded, padded[:, :, above:below]
