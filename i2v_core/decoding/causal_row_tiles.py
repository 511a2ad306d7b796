"""Layers of a video autoencoder that is causal in time, run over tiles of rows of a few frames at a time.

A temporal convolution also reads the frames before: the last frames that each convolution read are kept for its next
call. So frames may arrive in chunks, each is computed once, and the result is that of all frames at once.

Legend: N frames, P past frames, C channels, r rows of a tile, W width.
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
from .feature_map import FeatureMap, FeatureMaps
from .row_tiles import RowTiledLayers

# Takes the rows of a tile, and the tile (N, C, r, W), which it may overwrite.
_Write: TypeAlias = Callable[[slice, torch.Tensor], None]
# PyTorch's 3D convolution, or one that takes the same: input, weight, bias, stride and padding.
_Conv3d: TypeAlias = Callable[..., torch.Tensor]


class CausalRowTiledLayers(RowTiledLayers):
    """Layers of a causal autoencoder, which run once for each chunk of frames, in order.

    Past frames that convolutions need again are kept on the device, or offloaded if the maps' bytes are limited.

    Args:
        replicates: whether convolutions pad with the nearest pixel and frame, rather than with zeros.
        conv3d: PyTorch's, or another with the same result.
    """

    def __init__(
        self,
        execution: Execution,
        maps: FeatureMaps,
        *,
        replicates: bool = False,
        conv3d: _Conv3d = functional.conv3d,
    ) -> None:
        super().__init__(execution, maps)
        self._replicates, self._conv3d = replicates, conv3d
        self._past: dict[nn.Module, FeatureMap] = {}

    def causal_resnet(self, block: Any, source: FeatureMap, *, keep: bool = False) -> FeatureMap:
        """Run a `WanResidualBlock`, in place unless it has a shortcut convolution or `keep` is true."""
        hidden = self.causal_convolve(block.conv1, source, norm=block.norm1)
        base = source
        if not isinstance(block.conv_shortcut, nn.Identity):
            base = self.causal_pointwise(block.conv_shortcut, source)
        return self.causal_convolve(block.conv2, hidden, norm=block.norm2, add_to=base, keep=keep and base is source)

    def causal_convolve(
        self,
        conv: Any,
        source: FeatureMap,
        *,
        norm: nn.Module | None = None,
        add_to: FeatureMap | None = None,
        keep: bool = False,
    ) -> FeatureMap:
        """Run a `WanCausalConv3d`, whose stride may be over time, after normalisation and SiLU where `norm` is given.

        A convolution over time only, to twice as many channels, returns twice as many frames, as in `WanResample`.
        If `add_to` is given, the result is added to it, in place unless `keep` is true.
        """
        doubles_frames = conv.kernel_size == (3, 1, 1) and conv.out_channels == 2 * conv.in_channels
        if add_to is not None and not keep:
            target = add_to.reset()
        else:
            frames, channels = source.frames // conv.stride[0], conv.out_channels
            if doubles_frames:
                frames, channels = 2 * frames, channels // 2
            target = self._maps.new(frames, channels, source.height, source.width)
        frame_chunk = self._frame_chunk(conv, source)
        usage = causal_workspace.convolution(
            source,
            target,
            past_frames=frame_chunk.past_frames,
            halo=frame_chunk.halo,
            normed=norm is not None,
            added=add_to is not None,
            doubles_frames=doubles_frames,
            offloads_past=frame_chunk.after.offloaded,
        )

        def run(rows: slice) -> None:
            tile = frame_chunk.convolved(rows, norm)
            if doubles_frames:
                tile = _channels_to_frames(tile)
            if add_to is not None:
                tile += add_to.read(rows)
            target.write(rows, tile)

        modules = (conv,) if norm is None else (norm, conv)
        self._run_tiles(run, usage, *modules, height=target.height)
        return target

    def causal_pointwise(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """Run a `WanCausalConv3d` of one pixel and one frame."""
        target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)

        def run(rows: slice) -> None:
            target.write(rows, functional.conv2d(source.read(rows), conv.weight[:, :, 0], conv.bias))

        self._run_tiles(run, workspace.pointwise(source, target), conv, height=target.height)
        return target

    def remember(self, conv: Any, source: FeatureMap) -> None:
        """Keep the last frame as a convolution's past, without running the convolution."""
        past = self._past[conv] = self._maps.new(1, source.channels, source.height, source.width, long_lived=True)

        def run(rows: slice) -> None:
            past.write(rows, source.read(rows)[-1:])

        self._run_tiles(run, causal_workspace.copy(source), height=source.height)

    def causal_attention(self, layer: nn.Module, source: FeatureMap) -> FeatureMap:
        """Run a `WanAttentionBlock`, in place, on untiled frames: each pixel attends to all."""
        with self._execution.layer(
            "attention",
            layer,
            total=source.frames,
            unit_bytes=causal_workspace.attention(source),
            result_excluded=True,
        ) as call:
            result, rows = source.reset(), slice(0, source.height)

            def run(frames: slice) -> None:
                attended = layer(source.read(rows, frames).transpose(0, 1)[None])[0].transpose(0, 1)
                result.write(rows, attended, frames)

            for frames in () if self._shape_only else self._execution.chunks(call):
                self._execution.runner.run_chunk(run, frames)
        return source

    def add_upsampled_shortcut(self, layer: Any, source: FeatureMap, target: FeatureMap, *, first: bool) -> FeatureMap:
        """Add the result of a `DupUp3D` for `source` to `target`, in place."""

        def run(rows: slice) -> None:
            tile = layer(source.read(rows).transpose(0, 1)[None], first_chunk=first)[0].transpose(0, 1)
            higher = slice(2 * rows.start, 2 * rows.stop)
            tile += target.read(higher)
            target.write(higher, tile)

        usage = causal_workspace.upsampled_shortcut(source, target, times=layer.factor_t)
        self._run_tiles(run, usage, layer, height=source.height)
        return target

    def add_downsampled_shortcut(self, layer: Any, source: FeatureMap, target: FeatureMap) -> FeatureMap:
        """Add the result of an `AvgDown3D` for `source` to `target`, in place."""
        factor = source.height // target.height

        def run(rows: slice) -> None:
            higher = slice(factor * rows.start, factor * rows.stop)
            tile = layer(source.read(higher).transpose(0, 1)[None])[0].transpose(0, 1)
            tile += target.read(rows)
            target.write(rows, tile)

        usage = causal_workspace.downsampled_shortcut(source, target, factor=factor)
        self._run_tiles(run, usage, layer, height=target.height)
        return target

    def causal_output(self, conv: Any, source: FeatureMap, norm: nn.Module, write: _Write) -> None:
        """Run the last normalisation and convolution, and call `write` with each tile (N, C, r, W)."""
        frame_chunk = self._frame_chunk(conv, source)
        usage = causal_workspace.output(
            source,
            channels=conv.out_channels,
            past_frames=frame_chunk.past_frames,
            offloads_past=frame_chunk.after.offloaded,
        )

        def run(rows: slice) -> None:
            write(rows, frame_chunk.convolved(rows, norm))

        self._run_tiles(run, usage, norm, conv, height=source.height)

    def _frame_chunk(self, conv: Any, source: FeatureMap) -> _FrameChunk:
        """Return the frames that a convolution reads now, and replace its past by the map that they will be kept in."""
        past_frames = conv.kernel_size[0] - conv.stride[0]
        before = self._past.get(conv)
        after = self._maps.new(past_frames, source.channels, source.height, source.width, long_lived=True)
        self._past[conv] = after
        return _FrameChunk(
            conv=conv, conv3d=self._conv3d, replicates=self._replicates, source=source, before=before, after=after
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _FrameChunk:
    """A chunk of frames that a convolution runs on, with the frames before."""

    conv: Any
    conv3d: _Conv3d
    replicates: bool
    source: FeatureMap

    before: FeatureMap | None
    """Past frames; None: padding."""

    after: FeatureMap
    """Map that the last frames are written to, as the next chunk's past."""

    @property
    def past_frames(self) -> int:
        return self.after.frames

    @property
    def halo(self) -> int:
        return self.conv.kernel_size[1] // 2

    def convolved(self, rows: slice, norm: nn.Module | None) -> torch.Tensor:
        """Return a tile (N, C, r, W) of the result, and keep its last frames; to be called once for each tile."""
        conv = self.conv
        tile_1CNrW = self._with_halo(rows, norm)[None]
        across = 0 if self.replicates else self.halo
        made = self.conv3d(tile_1CNrW, conv.weight, conv.bias, conv.stride, (0, 0, across))
        return made[0].transpose(0, 1)

    def _with_halo(self, rows: slice, norm: nn.Module | None) -> torch.Tensor:
        """Return past and present frames with the tile's halo, normalised and padded: (C, P + N, r + 2, W), or two
        pixels wider if they replicate.
        """
        source, past, halo = self.source, self.past_frames, self.halo
        across = halo if self.replicates else 0
        inside = slice(max(rows.start - halo, 0), min(rows.stop + halo, source.height))
        height = rows.stop - rows.start + 2 * halo
        padded = torch.empty(
            (source.channels, past + source.frames, height, source.width + 2 * across),
            dtype=source.dtype,
            device=source.device,
        )
        above = inside.start - rows.start + halo
        below = above + inside.stop - inside.start
        within = padded[:, :, above:below, across : across + source.width]
        past_part, new = within[:, :past], within[:, past:]
        tile_CNrW = source.read(inside).transpose(0, 1)
        if norm is None:
            new.copy_(tile_CNrW)
        else:
            new.copy_(norm(tile_CNrW[None])[0])
            functional.silu(new, inplace=True)
        del tile_CNrW
        if self.before is not None:
            past_part.copy_(self.before.read(inside).transpose(0, 1))
        elif self.replicates:
            past_part.copy_(new[:, :1].expand_as(past_part))
        else:
            past_part.zero_()
        last, own = slice(source.frames, None), slice(rows.start - inside.start, rows.stop - inside.start)
        self.after.write(rows, within[:, last, own].transpose(0, 1))
        if self.replicates:
            _replicate(padded, above, below, across)
        else:
            padded[:, :, :above].zero_()
            padded[:, :, below:].zero_()
        return padded


def _replicate(padded: torch.Tensor, above: int, below: int, across: int) -> None:
    """Fill the rows above and below, and then `across` columns on each side, with the nearest that are inside."""
    padded[:, :, :above].copy_(padded[:, :, above : above + 1].expand_as(padded[:, :, :above]))
    padded[:, :, below:].copy_(padded[:, :, below - 1 : below].expand_as(padded[:, :, below:]))
    if across:
        padded[..., :across].copy_(padded[..., across : across + 1].expand_as(padded[..., :across]))
        padded[..., -across:].copy_(padded[..., -across - 1 : -across].expand_as(padded[..., -across:]))


def _channels_to_frames(tile_NCrW: torch.Tensor) -> torch.Tensor:
    """Return (2 N, C / 2, r, W): each frame's two halves of channels become two successive frames."""
    frames, channels, rows, width = tile_NCrW.shape
    return tile_NCrW.reshape(frames, 2, channels // 2, rows, width).reshape(2 * frames, channels // 2, rows, width)
