"""The interface between a layer-by-layer forward and the code that places weights, traces memory or cancels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

LayerKind: TypeAlias = str
"""A layer's name in reports, such as "resnet"."""

Unit = Literal["frame", "pixel", "row", "part"]
"""The unit that a layer is chunked by: a frame (of batch × frames), a pixel of the layer's resolution over all frames,
a row of pixels, or a part that only the layer itself knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """One call of one layer, with the chunk size that was chosen for it."""

    kind: LayerKind
    unit: Unit

    modules: tuple[nn.Module, ...]
    """Modules that hold all weights which the call needs."""

    total: int
    """Number of units in the layer."""

    chunk_size: int
    """Number of units that run at a time."""

    unchunked: bool
    """Whether the layer's own forward runs, in one call."""

    workspace_bytes: int
    """Estimated bytes that one chunk takes beside the layer's input and output."""

    result_excluded: bool
    """Whether `workspace_bytes` of a chunked layer leaves out the result (and a scratch tensor) even where there is one
    chunk only, because it is written to memory that was allocated before."""

    limit_bytes: int
    """The workspace that this call was chunked for."""

    with_limit: Callable[[int], LayerCall]
    """Returns the same call, chunked for a workspace of so many bytes."""

    @property
    def workspace_holds_result(self) -> bool:
        """Whether `workspace_bytes` counts the result too, as it does where the layer runs in one go."""
        return self.unchunked or (self.chunk_size == self.total and not self.result_excluded)


class LayerRunner:
    """Runs every layer call of a chunked forward; this base class adds nothing to them.

    Subclasses load and unload weights in `enter`, measure memory there, or skip chunks in `chunk_slices`. All chunks of
    a layer, and both guidance branches of a batched pass, run inside one `enter`.

    Example: print each layer call as it runs.

        class PrintingRunner(LayerRunner):
            @contextmanager
            def enter(self, call):
                print(call.kind, call.chunk_size, "of", call.total)
                yield

        with chunked(unet, ChunkSettings(workspace_bytes=256 * MIB), runner=PrintingRunner()):
            unet(**inputs)
    """

    shape_only = False
    """Whether layers compute nothing and only allocate their results, with undefined values. So all tensor sizes of a
    forward are known within milliseconds."""

    def enter(self, call: LayerCall) -> AbstractContextManager[None]:  # noqa: ARG002
        """Return the context that the call runs in."""
        return nullcontext()

    def chunk_slices(self, total: int, size: int) -> Iterator[slice]:
        """Yield slices that cover 0 to `total`, each `size` long but for the last."""
        for start in range(0, total, size):
            yield slice(start, min(start + size, total))

    def run_chunk(self, run: Callable[[slice], None], chunk: slice) -> None:
        """Run one chunk of a tiled layer. Subclasses may run it in parts, again after `run` has raised too: `run`
        writes its result as its last act.
        """
        run(chunk)
