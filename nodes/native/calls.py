"""The state of a fitted model's calls: how finely they are cut, and what runs around each layer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...i2v_core.chunking import ChunkSettings, LayerKind, LayerRunner
from ...i2v_core.chunking.execution import Execution
from .quantised_layers import scales_whole_input

TOKEN_MULTIPLE = 128
"""Chunks are multiples of this many tokens: SageAttention quantises queries in blocks of 128, and kernels like it."""
HEAD_MULTIPLE = 4
"""Groups are multiples of this many heads: the linear layers of fewer would be too narrow to keep a card busy."""


def nothing() -> None:
    """Do nothing."""


@dataclass(slots=True, kw_only=True, eq=False)
class CallState:
    """Settings by which the patched layers of one model run now.

    The patches of a clone share it, and one call at a time uses it.
    """

    workspace_bytes: int | None = None
    """Temporary memory that one layer may take beside the hidden state, keys and values. None: layers run unchunked."""
    dtype: torch.dtype = torch.float32
    """Precision of the hidden state in the call under way."""
    runner: LayerRunner = field(default_factory=LayerRunner)
    attention_options: dict[str, Any] = field(default_factory=dict[str, Any])
    """Options for attention that core calls without those of the call; a twin's replace the kernel."""
    check_cancelled: Callable[[], None] = nothing
    """Raises to cancel the call."""

    @property
    def chunked(self) -> bool:
        return self.workspace_bytes is not None

    def on_chunk(self) -> None:
        """To be called before every chunk; may raise to cancel the call."""
        if not torch.compiler.is_compiling():  # it cannot follow the host's lock
            self.check_cancelled()

    @contextmanager
    def weights(self, kind: LayerKind, *modules: nn.Module) -> Generator[None]:
        """The runner's context around `modules` that several loops over tokens use, which would each bring them in."""
        with self.tokens(kind, *modules, total=1, unit_bytes=1):
            yield

    def tokens(
        self,
        kind: LayerKind,
        *modules: nn.Module,
        total: int,
        unit_bytes: int,
        multiple: int = TOKEN_MULTIPLE,
        smallest: int | None = None,
        runs: Sequence[slice] = (),
    ) -> AbstractContextManager[Iterator[slice]]:
        """The chunks of one layer's tokens, or of other units, inside the runner's context around `modules`.

        Args:
            modules: those whose weights the layer needs, for inputs in the precision of the hidden state.
            total: tokens of the call.
            unit_bytes: temporary bytes of one token, over the whole batch.
            multiple: of units that chunks have; 1 for units of many tokens, such as frames.
            smallest: fewest units of a chunk, whatever they take; None: the multiple.
            runs: runs of tokens that the layer treats differently, which no chunk crosses; empty: all alike.

        There is one chunk where a layer's result would depend on how its input is cut.
        """
        whole = any(scales_whole_input(layer) for module in modules for layer in module.modules())
        return self._chunks(
            kind,
            *modules,
            total=total,
            unit_bytes=unit_bytes,
            multiple=multiple,
            smallest=total if whole else smallest or multiple,
            runs=runs,
        )

    def heads(
        self, kind: LayerKind, *modules: nn.Module, total: int, unit_bytes: int, together: bool = False
    ) -> AbstractContextManager[Iterator[slice]]:
        """The groups of one attention layer's heads, inside the runner's context around `modules`.

        Args:
            modules: those whose weights the layer needs, for inputs in the precision of the hidden state.
            total: heads of the layer.
            unit_bytes: temporary bytes of one head, over all tokens and the whole batch.
            together: whether the heads cannot be computed apart, so that all are one group.
        """
        multiple = total if together else HEAD_MULTIPLE
        return self._chunks(kind, *modules, total=total, unit_bytes=unit_bytes, multiple=multiple, smallest=multiple)

    @contextmanager
    def _chunks(
        self,
        kind: LayerKind,
        *modules: nn.Module,
        total: int,
        unit_bytes: int,
        multiple: int,
        smallest: int,
        runs: Sequence[slice] = (),
    ) -> Generator[Iterator[slice]]:
        assert self.workspace_bytes is not None
        execution = Execution(
            settings=ChunkSettings(workspace_bytes=self.workspace_bytes),
            runner=self.runner,
            on_chunk=self.on_chunk,
            num_frames=1,
        )
        with execution.layer(
            kind,
            *modules,
            total=total,
            unit_bytes=unit_bytes,
            smallest=min(smallest, total),
            result_excluded=True,
        ) as call:
            size = -(-call.chunk_size // multiple) * multiple
            yield _chunks_of(execution, runs or (slice(0, total),), size)


def _chunks_of(execution: Execution, runs: Sequence[slice], size: int) -> Iterator[slice]:
    for run in runs:
        length = run.stop - run.start
        for chunk in execution.chunk_slices(length, min(size, length)):
            yield slice(run.start + chunk.start, run.start + chunk.stop)
