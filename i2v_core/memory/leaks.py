"""Tensors that are still alive after some work, and where they were allocated: for debugging memory leaks."""

from __future__ import annotations

import gc
import logging
import sys
import tracemalloc
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..units import KIB, format_gib
from . import meter

logger = logging.getLogger(__name__)

# Files whose lines are skipped in search of the calling line: libraries, and code between it and the operation.
_SKIPPED_PATHS = (str(Path(torch.__file__).parent.parent), __file__, meter.__file__)
# Files whose own allocations are left out of the report, since they come from making it.
_OWN_FILES = [sys.modules[name].__file__ or "" for name in (__name__, "torch.utils.weak", "tracemalloc", "weakref")]


@dataclass(frozen=True, slots=True)
class TensorTotals:
    """Number of some tensors, and the bytes of their storages, each counted once."""

    tensors: int
    size_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> TensorTotals:
        sizes = [(storage.data_ptr(), storage.nbytes()) for storage in (it.untyped_storage() for it in tensors)]
        return cls(len(sizes), sum(dict(sizes).values()))

    def __str__(self) -> str:
        return f"{self.tensors} tensors of {format_gib(self.size_bytes)}"


def live_tensors() -> list[Tensor]:
    """Return every tensor that Python can reach and that takes memory, after a garbage collection."""
    gc.collect()
    # By `type(it)`, since `isinstance` makes some libraries' lazy objects import their module.
    found = [it for it in gc.get_objects() if issubclass(type(it), Tensor)]
    return [it for it in found if it.layout is torch.strided and it.device.type != "meta" and it.numel()]


class LiveTensorReport:
    """Finds tensors that were created after this report was, and are alive; holds earlier tensors weakly.

    Made by `traced`, it also knows where they were allocated, and where Python's own memory has grown.
    """

    def __init__(self, sites: AllocationSites | None = None) -> None:
        self._sites = sites
        self._before = {id(tensor): weakref.ref(tensor) for tensor in live_tensors()}
        self._allocated = tracemalloc.take_snapshot() if tracemalloc.is_tracing() else None

    def tensors(self) -> list[Tensor]:
        """Return the new tensors, the largest first."""
        new = [it for it in live_tensors() if self._known_before(it) is not it]
        return sorted(new, key=lambda it: -it.untyped_storage().nbytes())

    def report(self, limit: int = 5) -> str:
        """Return text that says how many there are, with a line for each of the `limit` largest."""
        tensors = self.tensors()
        lines = [f"{TensorTotals.of(tensors)} are alive that were not before", *map(self._described, tensors[:limit])]
        if self._allocated is not None:
            lines += ["Python's own memory has changed most at", *self._changed(limit)]
        return "\n  ".join(lines)

    def _known_before(self, tensor: Tensor) -> Tensor | None:
        reference = self._before.get(id(tensor))
        return reference() if reference is not None else None

    def _described(self, tensor: Tensor) -> str:
        kind = f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        place = self._sites.of(tensor) if self._sites is not None else None
        size = f"{tensor.untyped_storage().nbytes() / KIB:,.1f} KiB"
        return f"{kind}, {size}, made at {place}" if place else f"{kind}, {size}"

    def _changed(self, limit: int) -> Iterator[str]:
        assert self._allocated is not None
        others = [tracemalloc.Filter(inclusive=False, filename_pattern=path) for path in _OWN_FILES]
        before, now = (it.filter_traces(others) for it in (self._allocated, tracemalloc.take_snapshot()))
        for change in now.compare_to(before, "lineno")[:limit]:
            frame = change.traceback[0]
            place = f"{frame.filename}:{frame.lineno}"
            yield f"{place}: {change.size_diff / KIB:+,.1f} KiB in {change.count_diff:+d} blocks"


class AllocationSites(TorchDispatchMode):
    """Remembers the line that allocated each storage, for as long as the storage lives.

    `tracemalloc` cannot do this: in CPython 3.11 it does not find tensor objects.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._places = cast("MutableMapping[torch.UntypedStorage, str]", WeakIdKeyDictionary())

    def of(self, tensor: Tensor) -> str | None:
        """Return the file and line that allocated a tensor; None where it is unknown."""
        return self._places.get(tensor.untyped_storage())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result: Any = func(*args, **(kwargs or {}))
        results: Sequence[Any] = result if type(result) in {tuple, list} else (result,)
        for tensor in results:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and self.of(tensor) is None:
                self._places[tensor.untyped_storage()] = _calling_line()
        return result


@contextmanager
def traced() -> Generator[LiveTensorReport]:
    """Record where tensors and Python's own memory are allocated within the context, which makes it much slower."""
    started_here = not tracemalloc.is_tracing()
    if started_here:
        tracemalloc.start()
    try:
        with AllocationSites() as sites:
            yield LiveTensorReport(sites)
    finally:
        if started_here:
            tracemalloc.stop()


@contextmanager
def live_tensors_logged(work: str) -> Generator[None]:
    """Log, when the context ends, the tensors that were created in it and are alive: the work's results, and leaks."""
    with traced() as report:
        try:
            yield
        finally:
            logger.info("after %s %s", work, report.report())


def _calling_line() -> str:
    """Return the innermost line of the stack that is in no library."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED_PATHS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
