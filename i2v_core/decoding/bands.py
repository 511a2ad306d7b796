"""Layers of an autoencoder, run over bands of rows: with the rows around a band that its convolution sees.

Group normalisations go by the statistics of the whole map, which are gathered while it is written. So there is nothing
to blend, and no row is computed twice.

Legend: N frames, C channels, r rows of a band, W width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
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

# A group normalisation whose statistics are known: scale and shift (N, C, 1, 1) in fp32.
Affine = tuple[torch.Tensor, torch.Tensor]

# Of one frame and of several: thinner bands would read and normalise many rows twice.
_FEWEST_ROWS, _FEWEST_ROWS_OF_MANY = 8, 2


class RowTiledLayers:
    """The layers of one pass through an autoencoder, in pieces that keep to the execution's workspace.

    Where the execution's runner outlines, no layer computes, and only maps are made.
    """

    def __init__(self, execution: Execution, maps: FeatureMaps) -> None:
        self._execution, self._maps = execution, maps
        self._outlines = execution.runner.shape_only

    def resnet(self, block: Any, source: FeatureMap) -> FeatureMap:
        """A `ResnetBlock2D` without embedding. The result takes the place of `source` where it can."""
        hidden = self.convolve(block.conv1, source, norm=block.norm1)
        base = source if block.conv_shortcut is None else self.pointwise(block.conv_shortcut, source)
        return self.convolve(block.conv2, hidden, norm=block.norm2, onto=base)

    def convolve(
        self, conv: Any, source: FeatureMap, *, norm: nn.GroupNorm | None = None, onto: FeatureMap | None = None
    ) -> FeatureMap:
        """Normalisation and SiLU (with `norm`), then a 3×3 convolution.

        `onto`: what the result is added to, and whose memory it takes.
        """
        if onto is None:
            target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)
        else:
            target = onto.overwritten()
        modules = (conv,) if norm is None else (norm, conv)
        taken = workspace.convolution(source, target, added=onto is not None)
        with self._layer(taken, *modules, height=target.height) as bands:
            affine = None if norm is None else self._affine(source, norm)
            for rows in bands:
                band = functional.conv2d(_around(source, rows, affine), conv.weight, conv.bias, padding=(0, 1))
                if onto is not None:
                    band += onto.read(rows)
                target.write(rows, band)
                del band  # not beside the next one's input
        return target

    def pointwise(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """A 1×1 convolution."""
        target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)
        with self._layer(workspace.pointwise(source, target), conv, height=target.height) as bands:
            for rows in bands:
                target.write(rows, functional.conv2d(source.read(rows), conv.weight, conv.bias))
        return target

    def upsample(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """Each pixel twice in both directions, then a 3×3 convolution."""
        target = self._maps.new(source.frames, conv.out_channels, 2 * source.height, 2 * source.width)
        with self._layer(workspace.doubling(source, target), conv, height=target.height) as bands:
            for rows in bands:
                band = functional.conv2d(_doubled_around(source, rows), conv.weight, conv.bias, padding=(0, 1))
                target.write(rows, band)
                del band
        return target

    def downsample(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """A 3×3 convolution with a stride of two, which pads at the right and at the bottom."""
        target = self._maps.new(source.frames, conv.out_channels, source.height // 2, source.width // 2)
        with self._layer(workspace.halving(source, target), conv, height=target.height) as bands:
            for rows in bands:
                band = functional.conv2d(_right_and_below(source, rows), conv.weight, conv.bias, stride=2)
                target.write(rows, band)
                del band
        return target

    def along_time(
        self,
        conv: Any,
        source: FeatureMap,
        norm: nn.GroupNorm,
        *,
        onto: FeatureMap | None = None,
        mixer: Any = None,
    ) -> FeatureMap:
        """Normalisation over all frames and SiLU, then a convolution over three frames of each pixel.

        `onto`: what the result is added to, and whose memory it takes; of the result as much as its `mixer` says.
        """
        target = self._maps.new(source.frames, conv.out_channels, source.height, source.width) if onto is None else onto
        taken = workspace.along_time(source, target, added=onto is not None)
        modules = (norm, conv) if mixer is None else (norm, conv, mixer)
        with self._layer(taken, *modules, height=target.height) as bands:
            affine = None if self._outlines else source.moments.pooled().scale_and_shift(norm)
            target.overwritten()
            for rows in bands:
                band = _convolved_along_time(conv, source, rows, affine)
                if onto is not None:
                    band.mul_(temporal_share(mixer, band.dtype)).add_(onto.read(rows))
                target.write(rows, band)
                del band
        return target

    def attention(self, layer: nn.Module, source: FeatureMap) -> FeatureMap:
        """A diffusers `Attention` with its normalisation and residual: over whole frames, since all pixels meet."""
        execution, frame_bytes = self._execution, workspace.attention(source)
        with execution.layer(
            "attention", layer, unit="frame", total=source.frames, unit_bytes=frame_bytes, result_apart=True
        ) as call:
            result, rows = source.overwritten(), slice(0, source.height)
            for frames in () if self._outlines else execution.chunks(call):
                attended = layer(source.read(rows, frames).contiguous())
                result.write(rows, attended, frames)
                del attended
        return source

    def result(self, conv: Any, source: FeatureMap, norm: nn.GroupNorm, target_NHWC: torch.Tensor) -> None:
        """The last normalisation and convolution, written to a tensor in host memory."""
        taken = workspace.last(source, conv.out_channels)
        with self._layer(taken, norm, conv, height=source.height) as bands:
            affine = self._affine(source, norm)
            for rows in bands:
                band = functional.conv2d(_around(source, rows, affine), conv.weight, conv.bias, padding=(0, 1))
                target_NHWC[:, rows] = band.permute(0, 2, 3, 1)
                del band

    def result_along_time(self, conv: Any, source: FeatureMap, target_NHWC: torch.Tensor) -> None:
        """A last convolution over three frames of each pixel, written to a tensor in host memory."""
        taken = workspace.last_along_time(source, conv.out_channels)
        with self._layer(taken, conv, height=source.height) as bands:
            for rows in bands:
                band = _convolved_along_time(conv, source, rows, None)
                target_NHWC[:, rows] = band.permute(0, 2, 3, 1)
                del band

    def _affine(self, source: FeatureMap, norm: nn.GroupNorm) -> Affine | None:
        """What `norm` does to the values of a map."""
        if self._outlines:
            return None
        scale, shift = source.moments.scale_and_shift(norm)
        return scale[:, :, None, None], shift[:, :, None, None]

    @contextmanager
    def _layer(self, taken: Workspace, *modules: nn.Module, height: int) -> Generator[Iterator[slice]]:
        """The bands of one layer call, of as many rows as its workspace allows, evened out."""
        fewest_rows = _FEWEST_ROWS if self._execution.num_frames == 1 else _FEWEST_ROWS_OF_MANY
        layer = _BandLayer(modules=modules, height=height, taken=taken, fewest_rows=fewest_rows)
        with self._execution.enter(layer.cut) as call:
            yield iter(()) if self._outlines else self._execution.chunks(call)


@dataclass(frozen=True, slots=True, kw_only=True)
class _BandLayer:
    """What is known of a layer call before it is cut: `height` rows of its result in bands of `fewest_rows` or more."""

    modules: tuple[nn.Module, ...]
    height: int
    taken: Workspace
    fewest_rows: int

    def cut(self, limit_bytes: int) -> LayerCall:
        """The call for a workspace of so many bytes."""
        fitting = max(self.fewest_rows, self.taken.rows_within(limit_bytes))
        rows = -(-self.height // -(-self.height // min(fitting, self.height)))
        return LayerCall(
            kind="band",
            unit="row",
            modules=self.modules,
            total=self.height,
            chunk_size=rows,
            whole=False,
            workspace_bytes=self.taken.of(rows),
            result_apart=True,  # it goes to a map that was there before
            limit_bytes=limit_bytes,
            cut=self.cut,
        )


def _convolved_along_time(conv: Any, source: FeatureMap, rows: slice, affine: Affine | None) -> torch.Tensor:
    """A convolution over three frames of a band: (N, C, r, W); the band is normalised before, with SiLU."""
    clip_1CNrW = _clip(source, rows, affine)
    return functional.conv3d(clip_1CNrW, conv.weight, conv.bias, padding=(1, 0, 0))[0].transpose(0, 1)


def _clip(source: FeatureMap, rows: slice, affine: Affine | None) -> torch.Tensor:
    """A band (1, C, N, r, W) as one clip, normalised."""
    band_NCrW = source.read(rows)
    clip_CNrW = band_NCrW.new_empty(band_NCrW.transpose(0, 1).shape)
    if affine is None:
        clip_CNrW.copy_(band_NCrW.transpose(0, 1))
    else:
        scale_1C11, shift_1C11 = (it[:, :, None, None] for it in affine)
        torch.addcmul(shift_1C11, band_NCrW, scale_1C11, out=clip_CNrW.transpose(0, 1))
        functional.silu(clip_CNrW, inplace=True)
    return clip_CNrW[None]


def _around(source: FeatureMap, rows: slice, affine: Affine | None) -> torch.Tensor:
    """A band (N, C, r + 2, W) with a row more above and below, normalised; zeros outside of the map."""
    inside = slice(max(rows.start - 1, 0), min(rows.stop + 1, source.height))
    band = source.read(inside)
    padded, interior = _zero_framed(band, rows.stop - rows.start + 2, inside.start - rows.start + 1, band.shape[-1])
    if affine is None:
        interior.copy_(band)
        return padded
    scale, shift = affine
    torch.addcmul(shift, band, scale, out=interior)  # in fp32, rounded once
    functional.silu(interior, inplace=True)
    return padded


def _doubled_around(source: FeatureMap, rows: slice) -> torch.Tensor:
    """The same of a map twice as high and wide, of which each pixel of `source` makes four."""
    inside = slice(max(rows.start - 1, 0), min(rows.stop + 1, 2 * source.height))
    needed = slice(inside.start // 2, (inside.stop + 1) // 2)
    of_row = torch.arange(inside.start, inside.stop, device=source.device) // 2 - needed.start
    band = source.read(needed).index_select(2, of_row)
    width = 2 * source.width
    padded, interior = _zero_framed(band, rows.stop - rows.start + 2, inside.start - rows.start + 1, width)
    interior[..., 0::2] = band
    interior[..., 1::2] = band
    return padded


def _right_and_below(source: FeatureMap, rows: slice) -> torch.Tensor:
    """What a stride of two reads for a band: twice its rows and one more, with a column of zeros at the right."""
    inside = slice(2 * rows.start, min(2 * rows.stop + 1, source.height))
    band = source.read(inside)
    padded, interior = _zero_framed(band, 2 * (rows.stop - rows.start) + 1, 0, source.width + 1)
    padded[..., -1].zero_()
    interior[..., :-1] = band
    return padded


def _zero_framed(band: torch.Tensor, height: int, above: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A new tensor (N, C, height, width), zero above and below, and the part of it that is to hold the band."""
    padded = band.new_empty(*band.shape[:2], height, width)
    below = above + band.shape[2]
    padded[:, :, :above].zero_()
    padded[:, :, below:].zero_()
    return padded, padded[:, :, above:below]
