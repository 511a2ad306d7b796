"""What is still alive when some work is done: tensors, and where they were made. For tests, and for who debugs."""

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

# Where lines are not looked for: libraries, and what stands between a line and the operation that it calls.
_NOT_LOOKED_IN = (str(Path(torch.__file__).parent.parent), __file__, meter.__file__)
# What watching takes itself.
_OWN_MEMORY = [sys.modules[name].__file__ or "" for name in (__name__, "torch.utils.weak", "tracemalloc", "weakref")]


@dataclass(frozen=True, slots=True)
class Alive:
    """Some tensors: their number, and the bytes of their storages, each counted once."""

    tensors: int
    size_bytes: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Alive:
        sizes = [(storage.data_ptr(), storage.nbytes()) for storage in (it.untyped_storage() for it in tensors)]
        return cls(len(sizes), sum(dict(sizes).values()))

    def __str__(self) -> str:
        return f"{self.tensors} tensors of {format_gib(self.size_bytes)}"


def live_tensors() -> list[Tensor]:
    """Every tensor that Python can reach and that takes memory, after what is garbage has been freed."""
    gc.collect()
    # By `type`, since some libraries' objects load a module when they are asked what they are.
    found = [it for it in gc.get_objects() if issubclass(type(it), Tensor)]
    return [it for it in found if it.layout is torch.strided and it.device.type != "meta" and it.numel()]


class LiveTensorReport:
    """The tensors that have come to be since this was made, and are alive. Tensors before are remembered weakly.

    Made by `traced`, it knows also where they were made, and where Python's own memory has grown.
    """

    def __init__(self, birthplaces: AllocationSites | None = None) -> None:
        self._birthplaces = birthplaces
        self._before = {id(tensor): weakref.ref(tensor) for tensor in live_tensors()}
        self._allocated = tracemalloc.take_snapshot() if tracemalloc.is_tracing() else None

    def tensors(self) -> list[Tensor]:
        """The largest first."""
        new = [it for it in live_tensors() if self._known(it) is not it]
        return sorted(new, key=lambda it: -it.untyped_storage().nbytes())

    def report(self, limit: int = 5) -> str:
        """How many there are, and a line for each of the largest."""
        tensors = self.tensors()
        lines = [f"{Alive.of(tensors)} are alive that were not before", *map(self._described, tensors[:limit])]
        if self._allocated is not None:
            lines += ["Python's own memory has changed most at", *self._changed(limit)]
        return "\n  ".join(lines)

    def _known(self, tensor: Tensor) -> Tensor | None:
        reference = self._before.get(id(tensor))
        return reference() if reference is not None else None

    def _described(self, tensor: Tensor) -> str:
        kind = f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
        place = self._birthplaces.of(tensor) if self._birthplaces is not None else None
        size = f"{tensor.untyped_storage().nbytes() / KIB:,.1f} KiB"
        return f"{kind}, {size}, made at {place}" if place else f"{kind}, {size}"

    def _changed(self, limit: int) -> Iterator[str]:
        assert self._allocated is not None
        others = [tracemalloc.Filter(inclusive=False, filename_pattern=path) for path in _OWN_MEMORY]
        before, now = (it.filter_traces(others) for it in (self._allocated, tracemalloc.take_snapshot()))
        for change in now.compare_to(before, "lineno")[:limit]:
            frame = change.traceback[0]
            place = f"{frame.filename}:{frame.lineno}"
            yield f"{place}: {change.size_diff / KIB:+,.1f} KiB in {change.count_diff:+d} blocks"


class AllocationSites(TorchDispatchMode):
    """Remembers the line that called PyTorch when a storage came to be, for as long as the storage lives.

    `tracemalloc` could tell, but not of tensors in CPython 3.11, whose objects it does not find.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._places = cast("MutableMapping[torch.UntypedStorage, str]", WeakIdKeyDictionary())

    def of(self, tensor: Tensor) -> str | None:
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
    """Knows where tensors are made while the context lasts, and where Python allocates; much slower."""
    started_here = not tracemalloc.is_tracing()
    if started_here:
        tracemalloc.start()
    try:
        with AllocationSites() as birthplaces:
            yield LiveTensorReport(birthplaces)
    finally:
        if started_here:
            tracemalloc.stop()


@contextmanager
def survivors_logged(work: str) -> Generator[None]:
    """When the context ends, the log says what has come to be in it and is alive: the work's results, and leaks."""
    with traced() as survivors:
        try:
            yield
        finally:
            logger.info("after %s %s", work, survivors.report())


def _calling_line() -> str:
    """The innermost line that is in no library."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_LOOKED_IN):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
