"""Layers of HunyuanVideo 1.5's autoencoder that Wan's has not, in bands.

Legend: N frames, C channels, r rows of a tile, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import comfy.ops
import torch
from torch import nn

from ....i2v_core.decoding import causal_workspace
from ....i2v_core.decoding.causal_row_tiles import CausalRowTiledLayers
from ....i2v_core.decoding.feature_map import FeatureMap
from ....i2v_core.decoding.workspace import MemoryTerm, Workspace, row_bytes

_Finish: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Makes a layer's result of a convolution's, and of what the layer reads."""


class HunyuanLayers(CausalRowTiledLayers):
    """Layers with shortcuts that rearrange or average channels, and attention over all pixels of all frames."""

    def widened(self, conv: Any, source: FeatureMap) -> FeatureMap:
        """A convolution, and the source added with each channel repeated."""
        target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)

        def finish(made: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            return made.add_(read.repeat_interleave(conv.out_channels // read.shape[1], dim=1))

        return self._finished(conv, source, target, finish)

    def narrowed(self, conv: Any, source: FeatureMap, norm: nn.Module) -> FeatureMap:
        """Normalisation, SiLU and a convolution, and the mean of groups of the source's channels added."""
        target = self._maps.new(source.frames, conv.out_channels, source.height, source.width)

        def finish(made: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            return made.add_(_means(read, conv.out_channels))

        return self._finished(conv, source, target, finish, norm=norm)

    def upsampled(self, layer: Any, source: FeatureMap, *, first: bool) -> FeatureMap:
        """An `UpSmpl`, which doubles height and width, and frames but the first: its channels become pixels."""
        conv, times = layer.conv.conv, 2 if layer.tus else 1
        channels = conv.out_channels // (4 * times)
        repeats = layer.rp
        if first and times == 2:  # the first frame is the first of the two that it would become
            times, repeats = 1, layer.rp // 2
        target = self._maps.new(times * source.frames, channels, 2 * source.height, 2 * source.width)

        def finish(made: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            spread = _spread(made, times)[:, :channels]
            return spread.add_(_spread(read.repeat_interleave(repeats, dim=1), times))

        return self._finished(conv, source, target, finish, up=2)

    def downsampled(self, layer: Any, source: FeatureMap, *, first: bool) -> FeatureMap:
        """A `DnSmpl`, which halves height and width, and frames but the first: pixels become channels."""
        conv, times = layer.conv.conv, 2 if layer.tds else 1
        doubled = first and times == 2
        channels = 4 * times * conv.out_channels
        times = 1 if doubled else times
        target = self._maps.new(source.frames // times, channels, source.height // 2, source.width // 2)

        def finish(made: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
            gathered = _gathered(made, times)
            if doubled:  # the first frame stands for two
                gathered = torch.cat([gathered, gathered], dim=1)
            return gathered.add_(_means(_gathered(read, times), channels))

        return self._finished(conv, source, target, finish, down=2)

    def attention_over_clip(self, layer: Any, source: FeatureMap) -> FeatureMap:
        """An `AttnBlock`, in place: queries of some rows at a time; keys and values of all stay on the device."""
        row = row_bytes(source)
        with self._execution.layer(
            "attention", layer, total=source.height, unit_bytes=8 * row, result_excluded=True
        ) as call:
            if self._shape_only:
                return source
            tokens = source.frames * source.width
            keys, values = (
                torch.empty((1, 1, source.height * tokens, source.channels), dtype=source.dtype, device=source.device)
                for _ in range(2)
            )

            def project(rows: slice) -> None:
                normed = layer.norm(_clip(source, rows))
                of_rows = slice(tokens * rows.start, tokens * rows.stop)
                keys[:, :, of_rows] = _tokens(layer.k(normed))
                values[:, :, of_rows] = _tokens(layer.v(normed))

            def attend(rows: slice) -> None:
                queries = _tokens(layer.q(layer.norm(_clip(source, rows))))
                attended = comfy.ops.scaled_dot_product_attention(queries, keys, values)
                del queries
                shape = (rows.stop - rows.start, source.frames, source.width, source.channels)
                made = layer.proj_out(attended.view(shape).permute(3, 1, 0, 2)[None])
                del attended
                source.write(rows, made.add_(_clip(source, rows))[0].transpose(0, 1))

            for step in (project, attend):
                for rows in self._execution.chunks(call):
                    self._execution.runner.run_chunk(step, rows)
        return source

    def new_map(self, frames: int, channels: int, height: int, width: int) -> FeatureMap:
        """A map that is to be written in parts."""
        return self._maps.new(frames, channels, height, width)

    def copy(self, source: FeatureMap, target: FeatureMap) -> None:
        """Write a map's rows to another map."""
        usage = causal_workspace.copy(source)
        self._run_tiles(lambda rows: target.write(rows, source.read(rows)), usage, height=source.height)

    def _finished(
        self,
        conv: Any,
        source: FeatureMap,
        target: FeatureMap,
        finish: _Finish,
        *,
        norm: nn.Module | None = None,
        up: int = 1,
        down: int = 1,
    ) -> FeatureMap:
        """Run a convolution, and write what `finish` makes of its result, which has `up` rows for `down` of them."""
        chunk = self._frame_chunk(conv, source)
        usage = causal_workspace.convolution(
            source,
            target,
            past_frames=chunk.past_frames,
            halo=chunk.halo,
            normed=norm is not None,
            added=False,
            doubles_frames=False,
            offloads_past=chunk.after.offloaded,
        )
        terms = [MemoryTerm(down * it.row_bytes, it.border_bytes) for it in usage.terms]
        finishing = MemoryTerm(4 * up * row_bytes(target) + down * row_bytes(source))

        def run(rows: slice) -> None:
            read = slice(down * rows.start, down * rows.stop)
            made = finish(chunk.convolved(read, norm), source.read(read))
            target.write(slice(up * rows.start, up * rows.stop), made)

        modules = (conv,) if norm is None else (norm, conv)
        self._run_tiles(run, Workspace((*terms, finishing)), *modules, height=source.height // down)
        return target


def _clip(source: FeatureMap, rows: slice) -> torch.Tensor:
    return source.read(rows).transpose(0, 1)[None]


def _tokens(tile_1CNrW: torch.Tensor) -> torch.Tensor:
    """Pixels in the order of rows, then frames: (1, 1, r · N · W, C)."""
    return tile_1CNrW[0].permute(2, 1, 3, 0).reshape(1, 1, -1, tile_1CNrW.shape[1])


def _spread(tile_NCrW: torch.Tensor, times: int) -> torch.Tensor:
    """Channels (times, down, across, C) become frames and pixels."""
    frames, channels, rows, width = tile_NCrW.shape
    parts = tile_NCrW.reshape(frames, times, 2, 2, channels // (4 * times), rows, width)
    return parts.permute(0, 1, 4, 5, 2, 6, 3).reshape(frames * times, -1, 2 * rows, 2 * width)


def _gathered(tile_NCrW: torch.Tensor, times: int) -> torch.Tensor:
    """Frames and pixels become channels (times, down, across, C)."""
    frames, channels, rows, width = tile_NCrW.shape
    parts = tile_NCrW.reshape(frames // times, times, channels, rows // 2, 2, width // 2, 2)
    return parts.permute(0, 1, 4, 6, 2, 3, 5).reshape(frames // times, -1, rows // 2, width // 2)


def _means(tile_NCrW: torch.Tensor, channels: int) -> torch.Tensor:
    """Means of groups of channels, so many."""
    return tile_NCrW.unflatten(1, (channels, -1)).mean(dim=2)
