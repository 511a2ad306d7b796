"""Choosing the chunk size of a layer call, and the state that all layers of a chunked forward share."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..placement.layer_calls import LayerCall, LayerKind, LayerRunner, Unit
from .settings import ChunkSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkableWork:
    """Work of `total` units that may run in chunks."""

    total: int

    unit_bytes: int
    """Workspace bytes of one unit."""

    smallest: int = 1
    """Fewest units a chunk, even where they need more than the workspace."""

    largest: int | None = None
    """Most units a chunk, however large the workspace; None: no limit."""

    def chunk_size(self, limit_bytes: int) -> int:
        """Return how many units to run at once in a workspace of `limit_bytes`.

        Of all sizes that give the fewest chunks this is the smallest, so that chunks are about equal.
        """
        fitting = max(self.smallest, limit_bytes // self.unit_bytes)
        count = -(-self.total // min(fitting, self.largest or self.total, self.total))
        return -(-self.total // count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer call whose chunk size is still to be chosen. See `LayerCall` for the fields that it takes over."""

    kind: LayerKind
    unit: Unit
    modules: tuple[nn.Module, ...]
    work: ChunkableWork

    unchunked_bytes: int | None
    """Workspace of the layer's own forward over all units; None: that forward is never used."""

    preparation: ChunkableWork | None
    """Work that a chunked layer does before its first chunk, such as a first pass for statistics."""

    result_excluded: bool

    def call_within(self, limit_bytes: int) -> LayerCall:
        """Return the call, chunked for a workspace of `limit_bytes`."""
        work, unchunked_bytes = self.work, self.unchunked_bytes
        at_once = work.largest is None or work.largest >= work.total
        unchunked = unchunked_bytes is not None and unchunked_bytes <= limit_bytes and at_once
        size = work.total if unchunked else work.chunk_size(limit_bytes)
        preparation = self.preparation
        preparation_bytes = 0 if preparation is None else preparation.chunk_size(limit_bytes) * preparation.unit_bytes
        return LayerCall(
            kind=self.kind,
            unit=self.unit,
            modules=self.modules,
            total=work.total,
            chunk_size=size,
            unchunked=unchunked,
            workspace_bytes=unchunked_bytes
            if unchunked and unchunked_bytes is not None
            else max(size * work.unit_bytes, preparation_bytes),
            result_excluded=self.result_excluded,
            limit_bytes=limit_bytes,
            with_limit=self.call_within,
        )


class DistinctChunks(LayerRunner):
    """Skips chunks that need the same memory as one that ran, to trace a forward faster; its results are undefined.

    Runs the first chunk, the second (which runs beside the result that the first began), and a last one of another
    size.
    """

    def chunk_slices(self, total: int, size: int) -> Iterator[slice]:
        slices = list(super().chunk_slices(total, size))
        yield from slices[:2]
        if len(slices) > 2 and total % size:
            yield slices[-1]


class ShapeOnlyRunner(LayerRunner):
    """Runs a forward for its tensor sizes alone: live tensors are real, the layers' own use is `workspace_bytes`."""

    shape_only = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """State that the layers of one chunked forward share."""

    settings: ChunkSettings
    runner: LayerRunner

    on_chunk: Callable[[], None]
    """Called before every chunk; may raise to stop the forward."""

    num_frames: int
    """Frames of one clip of the batch."""

    @contextmanager
    def layer(
        self,
        kind: LayerKind,
        *modules: nn.Module,
        unit: Unit = "part",
        total: int,
        unit_bytes: int,
        unchunked_bytes: int | None = None,
        preparation: ChunkableWork | None = None,
        smallest: int = 1,
        largest: int | None = None,
        result_excluded: bool = False,
    ) -> Generator[LayerCall]:
        """Choose the chunk size of a layer call, enter the runner's context, call `on_chunk`, and run the body.

        See `Layer` and `ChunkableWork` for the arguments.
        """
        layer = Layer(
            kind=kind,
            unit=unit,
            modules=modules,
            work=ChunkableWork(total=total, unit_bytes=unit_bytes, smallest=smallest, largest=largest),
            unchunked_bytes=unchunked_bytes,
            preparation=preparation,
            result_excluded=result_excluded,
        )
        with self.enter(layer.call_within) as call:
            yield call

    @contextmanager
    def enter(self, call_within: Callable[[int], LayerCall]) -> Generator[LayerCall]:
        """Chunk a call for the workspace, enter the runner's context, call `on_chunk`, and run the body."""
        call = call_within(self.settings.workspace_bytes)
        with self.runner.enter(call):
            self.on_chunk()
            yield call

    def chunk_slices(self, total: int, size: int) -> Iterator[slice]:
        """Yield the runner's slices, with a call of `on_chunk` before each, which may raise to stop."""
        for chunk in self.runner.chunk_slices(total, size):
            self.on_chunk()
            yield chunk

    def chunks(self, call: LayerCall) -> Iterator[slice]:
        """Yield the slices of a layer call's chunks, with a call of `on_chunk` before each."""
        return self.chunk_slices(call.total, call.chunk_size)

    def over_frames(
        self,
        call: LayerCall,
        run: Callable[[slice], torch.Tensor],
        source: torch.Tensor,
        shape: tuple[int, ...],
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run a layer over the frames of `source` (N, ...), a chunk at a time, and return its result (N, *shape).

        Args:
            call: the layer call, chunked by frames.
            run: returns the layer's result for some of the frames.
            source: gives dtype and device of a new result.
            shape: the shape of one frame's result.
            target: the tensor to write to, which `run` may read the same frames of; None: a new one.
        """
        if self.runner.shape_only:
            return source.new_empty(call.total, *shape) if target is None else target
        for frames in self.chunks(call):
            result = run(frames)
            if call.chunk_size == call.total:
                return result
            if target is None:
                target = result.new_empty(call.total, *result.shape[1:])
            target[frames] = result
            del result  # or it would be alive beside the next chunk's workspace
        assert target is not None
        return target


class ChunkedForwardBase:
    """Base class for replacement forwards: holds the model, and makes an `Execution` for each call.

    Subclasses define `__call__` with the arguments and the result of the model's own forward. See `unet3d.py`, and
    `inject.replace_forward` for an example.
    """

    def __init__(self, model: Any, settings: ChunkSettings, on_chunk: Callable[[], None], runner: LayerRunner) -> None:
        self._model = model
        self._settings = settings
        self._on_chunk = on_chunk
        self._runner = runner

    def _execution(self, num_frames: int) -> Execution:
        return Execution(settings=self._settings, runner=self._runner, on_chunk=self._on_chunk, num_frames=num_frames)
