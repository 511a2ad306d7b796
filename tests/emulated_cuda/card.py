"""The memory of the emulated card."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from i2v_core.memory.meter import rounded_bytes, storage_key

from .streams import Streams

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")


class EmulatedCard:
    """Tracks tensors on the card, and raises `torch.OutOfMemoryError` above `limit_bytes`.

    `pinned_bytes` counts pinned host memory that is in use, or kept by the allocator for reuse.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes, self.peak_bytes = limit_bytes, 0, 0
        self.pinned_bytes, self._idle_pinned_bytes = 0, 0
        self.streams = Streams()
        self._on_card: dict[int, weakref.ref[Any]] = {}
        self._pinned: dict[int, weakref.ref[Any]] = {}

    @property
    def races(self) -> list[str]:
        return self.streams.races

    def holds(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and storage_key(tensor) in self._on_card

    def has_pinned(self, tensor: Tensor) -> bool:
        return storage_key(tensor) in self._pinned

    def put(self, tensor: Tensor) -> None:
        """Count a newly allocated tensor as on the card."""
        if self.holds(tensor):
            return
        size_bytes = rounded_bytes(tensor.untyped_storage().nbytes())
        if self.used_bytes + size_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory (emulated). Tried to allocate {size_bytes} bytes: {self.used_bytes} of "
                f"{self.limit_bytes} bytes are in use."
            )

        def freed() -> None:
            self.used_bytes -= size_bytes

        self._watch(tensor, self._on_card, freed)
        self.used_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def pin(self, tensor: Tensor) -> None:
        if self.has_pinned(tensor):
            return
        size_bytes = tensor.untyped_storage().nbytes()

        def freed() -> None:
            self._idle_pinned_bytes += size_bytes

        self._watch(tensor, self._pinned, freed)
        self.pinned_bytes += size_bytes

    def release_idle_pinned(self) -> None:
        self.pinned_bytes -= self._idle_pinned_bytes
        self._idle_pinned_bytes = 0

    def reset_peak(self) -> None:
        self.peak_bytes = self.used_bytes

    def _watch(self, tensor: Tensor, among: dict[int, weakref.ref[Any]], freed: Callable[[], None]) -> None:
        key = storage_key(tensor)

        def forget(_: object) -> None:
            del among[key]
            self.streams.freed(key)
            freed()

        among[key] = weakref.ref(tensor.untyped_storage(), forget)
        self.streams.allocated(key)
