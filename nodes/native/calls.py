"""The state of a fitted model's calls: how finely they are cut, and what runs around each layer."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from ...i2v_core.chunking import ChunkSettings, LayerKind, LayerRunner
from ...i2v_core.chunking.execution import Execution
from .quantised_layers import scales_whole_input

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
    def tokens(self, kind: LayerKind, *modules: nn.Module, total: int, unit_bytes: int) -> Generator[Iterator[slice]]:
        """The chunks of one layer's tokens, inside the runner's context around `modules`.

        Args:
            modules: those whose weights the layer needs.
            total: tokens of the call.
            unit_bytes: temporary bytes of one token, over the whole batch.

        There is one chunk where a layer's result would depend on how its input is cut.
        """
        assert self.workspace_bytes is not None
        whole = any(scales_whole_input(layer) for module in modules for layer in module.modules())
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
            smallest=total if whole else min(TOKEN_MULTIPLE, total),
            result_excluded=True,
        ) as call:
            size = -(-call.chunk_size // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
            yield execution.chunk_slices(total, min(size, total))
