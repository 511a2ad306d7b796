"""The seam between a forward that runs layer by layer and whoever places weights, traces memory or cancels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

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
    scratch tensor beside it, even if there is one chunk only. `cut` makes the same call for another workspace than this
    one's, of `limit_bytes`.
    """

    kind: LayerKind
    unit: Unit
    modules: tuple[nn.Module, ...]
    total: int
    chunk_size: int
    whole: bool
    workspace_bytes: int
    result_apart: bool
    limit_bytes: int
    cut: Callable[[int], LayerCall]

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

    shape_only = False

    def enter(self, call: LayerCall) -> AbstractContextManager[None]:  # noqa: ARG002
        """The context in which the call runs."""
        return nullcontext()

    def pieces(self, total: int, size: int) -> Iterator[slice]:
        """The slices of 0…total, each `size` long but for the last."""
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))
