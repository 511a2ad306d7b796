"""A layer runner that traces a forward with few of its chunks."""

from __future__ import annotations

from collections.abc import Iterator

from i2v_core.chunking import LayerRunner


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
