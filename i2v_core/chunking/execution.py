"""The seam between a chunked forward and whoever places weights, traces memory or cancels."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from .settings import ChunkSettings

LayerKind: TypeAlias = str
"""A name for reports."""

Unit = Literal["frame", "pixel", "row", "part"]
"""What a layer is cut into: frames (batch × frames); pixels of its resolution, over all frames; rows; or others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """One call of one layer.

    `modules` hold all the weights that the call needs. `total` and `chunk_size` count `unit`s. `workspace_bytes` is the
    estimate of what one chunk takes beside the layer's input and output; `whole` says that the layer's own forward
    runs, in one call. `result_apart` says that the workspace of a layer in chunks never counts the result, nor a
    scratch tensor beside it, even if there is one chunk only.
    """

    kind: LayerKind
    unit: Unit
    modules: tuple[nn.Module, ...]
    total: int
    chunk_size: int
    whole: bool
    workspace_bytes: int
    result_apart: bool = False

    @property
    def workspace_holds_result(self) -> bool:
        """Whether `workspace_bytes` counts the result too: that of a layer that runs in one go."""
        return self.whole or (self.chunk_size == self.total and not self.result_apart)


class LayerRunner:
    """Every layer call of a chunked forward goes through here; this one adds nothing.

    Subclasses bring weights in and out in `enter` (all chunks of a layer, and both guidance branches of a batched
    pass, run inside it), look at memory there, or leave chunks out in `pieces`.

    `outlines`: layers compute nothing and only allocate what stays when they are done, so that all sizes of a forward
    are known in milliseconds. The values that come out are void.
    """

    outlines = False

    def enter(self, call: LayerCall) -> AbstractContextManager[None]:  # noqa: ARG002
        """The context in which the call runs."""
        return nullcontext()

    def pieces(self, total: int, size: int) -> Iterator[slice]:
        """The slices of 0…total, each `size` long but for the last."""
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))


class DistinctPieces(LayerRunner):
    """Leaves out chunks that need the same memory as others: for tracing. The values that come out are void.

    What runs is the first chunk, the second (beside the result that the first began) and a last one of another shape.
    """

    def pieces(self, total: int, size: int) -> Iterator[slice]:
        pieces = list(super().pieces(total, size))
        yield from pieces[:2]
        if len(pieces) > 2 and total % size:
            yield pieces[-1]


class Outline(LayerRunner):
    """Goes through a forward for its sizes alone: what is live is real, what layers take is `workspace_bytes`."""

    outlines = True


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
        beforehand_bytes: int = 0,
        smallest: int = 1,
        largest: int | None = None,
        result_apart: bool = False,
    ) -> Generator[LayerCall]:
        """Chooses the chunk of a layer call, and runs the body inside the runner's context, announced by `on_chunk`.

        `unit_bytes` is the workspace of one unit, `whole_bytes` that of the layer's own forward over all (None: it is
        never run), `beforehand_bytes` what a layer in chunks takes before the first, `largest` a limit on a chunk that
        holds whatever memory there is.
        """
        largest = total if largest is None else min(largest, total)
        whole = whole_bytes is not None and whole_bytes <= self.settings.workspace_bytes and largest == total
        size = total if whole else self.chunk_size(total, unit_bytes, smallest=smallest, largest=largest)
        call = LayerCall(
            kind=kind,
            unit=unit,
            modules=modules,
            total=total,
            chunk_size=size,
            whole=whole,
            workspace_bytes=whole_bytes
            if whole and whole_bytes is not None
            else max(size * unit_bytes, beforehand_bytes),
            result_apart=result_apart,
        )
        with self.enter(call):
            yield call

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        """The runner's context around a call, announced by `on_chunk`."""
        with self.runner.enter(call):
            self.on_chunk()
            yield

    def chunk_size(self, total: int, unit_bytes: int, *, smallest: int = 1, largest: int | None = None) -> int:
        """How many units, between `smallest` and `largest`, fit into the workspace at once.

        Lowered so that the chunks of `total` units, no more of them for it, come out as equal as they can.
        """
        fitting = max(smallest, self.settings.workspace_bytes // unit_bytes)
        count = -(-total // min(fitting, largest or total, total))
        return -(-total // count)

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
        if self.runner.outlines:
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


class ReplacedForward:
    """What stands in for a model's forward: the model, and what each of its runs is executed with."""

    def __init__(self, model: Any, settings: ChunkSettings, on_chunk: Callable[[], None], runner: LayerRunner) -> None:
        self._model = model
        self._settings = settings
        self._on_chunk = on_chunk
        self._runner = runner

    def _execution(self, num_frames: int) -> Execution:
        return Execution(settings=self._settings, runner=self._runner, on_chunk=self._on_chunk, num_frames=num_frames)
