"""How one layer call is cut into chunks, and what the layers of a chunked forward share."""

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
class Pieces:
    """Work of `total` units, of `unit_bytes` each, in pieces of `smallest` to `largest` units (None: all of them)."""

    total: int
    unit_bytes: int
    smallest: int = 1
    largest: int | None = None

    def size(self, limit_bytes: int) -> int:
        """How many units fit into a workspace at once.

        Lowered so that the pieces, no more of them for it, come out as equal as they can.
        """
        fitting = max(self.smallest, limit_bytes // self.unit_bytes)
        count = -(-self.total // min(fitting, self.largest or self.total, self.total))
        return -(-self.total // count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What is known of a layer call before it is cut.

    `whole_bytes` is the workspace of the layer's own forward over all units (None: it is never run), `beforehand` what
    a layer in pieces does before the first.
    """

    kind: LayerKind
    unit: Unit
    modules: tuple[nn.Module, ...]
    pieces: Pieces
    whole_bytes: int | None
    beforehand: Pieces | None
    result_apart: bool

    def cut(self, limit_bytes: int) -> LayerCall:
        """The call for a workspace of so many bytes."""
        pieces, whole_bytes = self.pieces, self.whole_bytes
        at_once = pieces.largest is None or pieces.largest >= pieces.total
        whole = whole_bytes is not None and whole_bytes <= limit_bytes and at_once
        size = pieces.total if whole else pieces.size(limit_bytes)
        beforehand = self.beforehand
        beforehand_bytes = 0 if beforehand is None else beforehand.size(limit_bytes) * beforehand.unit_bytes
        return LayerCall(
            kind=self.kind,
            unit=self.unit,
            modules=self.modules,
            total=pieces.total,
            chunk_size=size,
            whole=whole,
            workspace_bytes=whole_bytes
            if whole and whole_bytes is not None
            else max(size * pieces.unit_bytes, beforehand_bytes),
            result_apart=self.result_apart,
            limit_bytes=limit_bytes,
            cut=self.cut,
        )


class DistinctPieces(LayerRunner):
    """Leaves out chunks that need the same memory as others: for tracing. The values that come out are void.

    What runs is the first chunk, the second (beside the result that the first began) and a last one of another shape.
    """

    def pieces(self, total: int, size: int) -> Iterator[slice]:
        pieces = list(super().pieces(total, size))
        yield from pieces[:2]
        if len(pieces) > 2 and total % size:
            yield pieces[-1]


class ShapeOnlyRunner(LayerRunner):
    """Goes through a forward for its sizes alone: what is live is real, what layers take is `workspace_bytes`."""

    shape_only = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """What the layers of one chunked forward share."""

    settings: ChunkSettings
    runner: LayerRunner
    on_chunk: Callable[[], None]
    num_frames: int

    @contextmanager
    def layer(
        self,
        kind: LayerKind,
        *modules: nn.Module,
        unit: Unit = "part",
        total: int,
        unit_bytes: int,
        whole_bytes: int | None = None,
        beforehand: Pieces | None = None,
        smallest: int = 1,
        largest: int | None = None,
        result_apart: bool = False,
    ) -> Generator[LayerCall]:
        """Chooses the chunk of a layer call, and runs the body inside the runner's context, announced by `on_chunk`.

        See `Layer` and `Pieces`; `largest` is a limit on a chunk that holds whatever memory there is.
        """
        layer = Layer(
            kind=kind,
            unit=unit,
            modules=modules,
            pieces=Pieces(total=total, unit_bytes=unit_bytes, smallest=smallest, largest=largest),
            whole_bytes=whole_bytes,
            beforehand=beforehand,
            result_apart=result_apart,
        )
        with self.enter(layer.cut) as call:
            yield call

    @contextmanager
    def enter(self, cut: Callable[[int], LayerCall]) -> Generator[LayerCall]:
        """The runner's context around a call, which is cut to the workspace, announced by `on_chunk`."""
        call = cut(self.settings.workspace_bytes)
        with self.runner.enter(call):
            self.on_chunk()
            yield call

    def pieces(self, total: int, size: int) -> Iterator[slice]:
        """The runner's slices, each announced by `on_chunk`, which may raise to stop."""
        for piece in self.runner.pieces(total, size):
            self.on_chunk()
            yield piece

    def chunks(self, call: LayerCall) -> Iterator[slice]:
        return self.pieces(call.total, call.chunk_size)

    def over_frames(
        self,
        call: LayerCall,
        run: Callable[[slice], torch.Tensor],
        source: torch.Tensor,
        shape: tuple[int, ...],
        target: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs a layer a chunk at a time over the frames of `source`; `shape` is that of one frame's result.

        The results go into `target`, which `run` may read from; into a new tensor if None.
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
            del result  # not beside the next chunk's workspace
        assert target is not None
        return target


class ChunkedForwardBase:
    """What stands in for a model's forward: the model, and what each of its runs is executed with."""

    def __init__(self, model: Any, settings: ChunkSettings, on_chunk: Callable[[], None], runner: LayerRunner) -> None:
        self._model = model
        self._settings = settings
        self._on_chunk = on_chunk
        self._runner = runner

    def _execution(self, num_frames: int) -> Execution:
        return Execution(settings=self._settings, runner=self._runner, on_chunk=self._on_chunk, num_frames=num_frames)
