"""Layers of a video autoencoder that is causal in time, run over bands of rows of some frames at a time.

A convolution over time sees the frames before: the last that it saw are kept, for each convolution. So frames come in
portions with the result of all at once, and each is computed once.

Legend: N frames, P frames before, C channels, r rows of a band, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from ..chunking.execution import Execution
from . import causal_workspace, workspace
from .bands import RowTiledLayers
from .feature_map import FeatureMap, FeatureMaps

# Takes a band (N, C, r, W), which is the taker's, of so many rows.
_Write: TypeAlias = Callable[[slice, torch.Tensor], None]


class CausalBands(RowTiledLayers):
    """The layers of an autoencoder, which passes run through one after another, each with the frames that come next.

    What convolutions are to see again waits on the device, or in host memory wherever the maps' bytes are limited.
    """

    def __init__(self, execution: Execution, maps: FeatureMaps) -> None:
        super().__init__(execution, maps)
        self._past: dict[nn.Module, FeatureMap] = {}

    def causal_resnet(self, block: Any, source: FeatureMap, *, keep: bool = False) -> FeatureMap:
        """A `WanResidualBlock`. The result takes the place of `source` where it can, unless that is to be kept."""
        hidden = self.causal(block.conv1, source, norm=block.norm1)
        base = source
        if not isinstance(block.conv_shortcut, nn.Identity):
            base = self.causal_pointwise(block.conv_shortcut, source)
        return self.causal(block.conv2, hidden, norm=block.norm2, onto=base, keep=keep and base is source)

    def causal(
        self,
        conv: Any,
        source: FeatureMap,
        *,
        norm: nn.Module | None = None,
        onto: FeatureMap | None = None,
        keep: bool = False,
    ) -> FeatureMap:
        """Normalisation and SiLU (with `norm`), then a `WanCausalConv3d`, whose stride may be over time.

        A convolution to twice as many channels, over time only, makes twice as many frames: as in `WanResample`.
        `onto`: what the result is added to, and whose memory it takes unless that is to be kept.
        """
        doubles = conv.kernel_size == (3, 1, 1) and conv.out_channels == 2 * conv.in_channels
        if onto is not None and not keep:
            target = onto.overwritten()
        else:
            frames, channels = source.frames // conv.stride[0], conv.out_channels
            if doubles:
                frames, channels = 2 * frames, channels // 2
            target = self._maps.new(frames, channels, source.height, source.width)
        portion = self._portion(conv, source)
        taken = causal_workspace.convolution(
            source,
            target,
            past_frames=portion.past_frames,
            halo=portion.halo,
            normed=norm is not None,
            added=onto is not None,
            doubled=doubles,
            parks_past=portion.after.parked,
        )
        modules = (conv,) if norm is None else (norm, conv)
        with self._layer(taken, *modules, height=target.height) as bands:
            for rows in bands:
                band = portion.convolved(rows, norm)
                if doubles:
                    band = _twice_the_frames(band)
                if onto is not None:
                    band += onto.read(rows)
                target.write(rows, band)
                del band  # not beside the next one's input
        return target

    def causal_pointwise(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """A `WanCausalConv3d` of one pixel and frame."""
        target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)
        with self._layer(workspace.pointwise(source, target), conv, height=target.height) as bands:
            for rows in bands:
                target.write(rows, functional.conv2d(source.read(rows), conv.weight[:, :, 0], conv.bias))
        return target

    def put_by(self, conv: Any, source: FeatureMap) -> None:
        """Lets a convolution see the last frame later, without running it."""
        past = self._past[conv] = self._maps.new(1, source.channels, source.height, source.width, waits=True)
        with self._layer(causal_workspace.copy(source), height=source.height) as bands:
            for rows in bands:
                past.write(rows, source.read(rows)[-1:])

    def causal_attention(self, layer: nn.Module, source: FeatureMap) -> FeatureMap:
        """A `WanAttentionBlock`: over whole frames, since all pixels meet."""
        with self._execution.layer(
            "attention",
            layer,
            total=source.frames,
            unit_bytes=causal_workspace.attention(source),
            result_apart=True,
        ) as call:
            result, rows = source.overwritten(), slice(0, source.height)
            for frames in () if self._outlines else self._execution.chunks(call):
                attended = layer(source.read(rows, frames).transpose(0, 1)[None])[0].transpose(0, 1)
                result.write(rows, attended, frames)
                del attended
        return source

    def add_enlarged(self, layer: Any, source: FeatureMap, target: FeatureMap, *, first: bool) -> FeatureMap:
        """Adds to the target, in place, what a `DupUp3D` makes of the source."""
        taken = causal_workspace.enlarged(source, target, times=layer.factor_t)
        with self._layer(taken, layer, height=source.height) as bands:
            for rows in bands:
                band = layer(source.read(rows).transpose(0, 1)[None], first_chunk=first)[0].transpose(0, 1)
                higher = slice(2 * rows.start, 2 * rows.stop)
                band += target.read(higher)
                target.write(higher, band)
                del band
        return target

    def add_reduced(self, layer: Any, source: FeatureMap, target: FeatureMap) -> FeatureMap:
        """Adds to the target, in place, what an `AvgDown3D` makes of the source."""
        factor = source.height // target.height
        taken = causal_workspace.reduced(source, target, factor=factor)
        with self._layer(taken, layer, height=target.height) as bands:
            for rows in bands:
                higher = slice(factor * rows.start, factor * rows.stop)
                band = layer(source.read(higher).transpose(0, 1)[None])[0].transpose(0, 1)
                band += target.read(rows)
                target.write(rows, band)
                del band
        return target

    def last(self, conv: Any, source: FeatureMap, norm: nn.Module, write: _Write) -> None:
        """The last normalisation and convolution, whose bands (N, C, r, W) go to `write`."""
        portion = self._portion(conv, source)
        taken = causal_workspace.last(
            source, channels=conv.out_channels, past_frames=portion.past_frames, parks_past=portion.after.parked
        )
        with self._layer(taken, norm, conv, height=source.height) as bands:
            for rows in bands:
                write(rows, portion.convolved(rows, norm))

    def _portion(self, conv: Any, source: FeatureMap) -> _Portion:
        """What the convolution is about to see; what it is to see again takes the place of what it saw."""
        past_frames = conv.kernel_size[0] - conv.stride[0]
        before = self._past.get(conv)
        after = self._maps.new(past_frames, source.channels, source.height, source.width, waits=True)
        self._past[conv] = after
        return _Portion(conv=conv, source=source, before=before, after=after)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Portion:
    """Frames that come to a convolution, those `before` (zeros, if None), and those that it is to see again `after`."""

    conv: Any
    source: FeatureMap
    before: FeatureMap | None
    after: FeatureMap

    @property
    def past_frames(self) -> int:
        return self.after.frames

    @property
    def halo(self) -> int:
        return self.conv.kernel_size[1] // 2

    def convolved(self, rows: slice, norm: nn.Module | None) -> torch.Tensor:
        """A band (N, C, r, W) of the convolution's result; each band is to be asked for once."""
        conv = self.conv
        band_1CNrW = self._around(rows, norm)[None]
        made = functional.conv3d(band_1CNrW, conv.weight, conv.bias, conv.stride, (0, 0, self.halo))
        return made[0].transpose(0, 1)

    def _around(self, rows: slice, norm: nn.Module | None) -> torch.Tensor:
        """(C, P + N, r + 2, W): frames before and now, normalised, with a row more above and below; zeros outside."""
        source, past, halo = self.source, self.past_frames, self.halo
        inside = slice(max(rows.start - halo, 0), min(rows.stop + halo, source.height))
        height = rows.stop - rows.start + 2 * halo
        padded = torch.empty(
            (source.channels, past + source.frames, height, source.width), dtype=source.dtype, device=source.device
        )
        above = inside.start - rows.start + halo
        below = above + inside.stop - inside.start
        padded[:, :, :above].zero_()
        padded[:, :, below:].zero_()
        seen, new = padded[:, :past, above:below], padded[:, past:, above:below]
        if self.before is None:
            seen.zero_()
        else:
            seen.copy_(self.before.read(inside).transpose(0, 1))
        band_CNrW = source.read(inside).transpose(0, 1)
        if norm is None:
            new.copy_(band_CNrW)
        else:
            new.copy_(norm(band_CNrW[None])[0])
            functional.silu(new, inplace=True)
        del band_CNrW
        self.after.write(rows, padded[:, source.frames :, halo : height - halo].transpose(0, 1))
        return padded


def _twice_the_frames(band_NCrW: torch.Tensor) -> torch.Tensor:
    """(2 N, C / 2, r, W): the halves of the channels are frames that follow one another."""
    frames, channels, rows, width = band_NCrW.shape
    return band_NCrW.reshape(frames, 2, channels // 2, rows, width).reshape(2 * frames, channels // 2, rows, width)
