"""The state of a fitted model's calls: how finely they are cut, and what runs around each layer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...i2v_core.chunking import ChunkSettings, LayerKind, LayerRunner
from ...i2v_core.chunking.execution import Execution

TOKEN_MULTIPLE = 128
"""Chunks are multiples of this many tokens: SageAttention quantises queries in blocks of 128, and kernels like it."""


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
    on_chunk: Callable[[], None] = nothing
    """Called before every chunk; may raise to cancel the call."""

    @property
    def chunked(self) -> bool:
        return self.workspace_bytes is not None

    @contextmanager
    def tokens(
        self, kind: LayerKind, *modules: nn.Module, total: int, unit_bytes: int, runs: Sequence[slice] = ()
    ) -> Generator[Iterator[slice]]:
        """The chunks of one layer's tokens, inside the runner's context around `modules`.

        Args:
            modules: those whose weights the layer needs.
            total: tokens of the call.
            unit_bytes: temporary bytes of one token, over the whole batch.
            runs: runs of tokens that the layer treats differently, which no chunk crosses; empty: all alike.
        """
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
            smallest=min(TOKEN_MULTIPLE, total),
            result_excluded=True,
        ) as call:
            size = -(-call.chunk_size // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
            yield _chunks(execution, runs or (slice(0, total),), size)


def _chunks(execution: Execution, runs: Sequence[slice], size: int) -> Iterator[slice]:
    for run in runs:
        length = run.stop - run.start
        for chunk in execution.chunk_slices(length, min(size, length)):
            yield slice(run.start + chunk.start, run.start + chunk.stop)
