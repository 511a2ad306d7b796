"""Measuring what a stage really takes: by the allocator on a GPU, by counting live storages elsewhere."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from ..units import format_gib
from .meter import StorageMeter

logger = logging.getLogger(__name__)


class StageMeter(ABC):
    """Peak bytes that one stage has on its device, and its seconds. Made by `stage_meter`.

    Counted is what the stage itself brings: its weights (`weights`) and the tensors it makes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._since = time.perf_counter()
        self.seconds = 0.0

    @property
    @abstractmethod
    def peak_bytes(self) -> int: ...

    @abstractmethod
    def restart_peak(self) -> None:
        """Forget the peak so far, of an attempt that failed."""

    @abstractmethod
    def log_step(self, step: int) -> None:
        """What is in use after a step, for who debugs."""

    def weights(self, module: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """Counts a module's weights while they are in place, where placing them allocated nothing (on the CPU)."""
        return nullcontext()

    @contextmanager
    def paused(self) -> Generator[None]:
        """While the context lasts, which must be in the thread of the stage, neither time nor storages count."""
        self.stop()
        try:
            yield
        finally:
            self._since = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._since


class CudaStageMeter(StageMeter):
    """Reads the caching allocator. Counts from what was allocated when the stage began."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._before_bytes = torch.cuda.memory_allocated(device)

    @property
    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before_bytes

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def log_step(self, step: int) -> None:
        logger.debug(
            "step %d: allocated %s, reserved %s, free %s",
            step,
            format_gib(torch.cuda.memory_allocated(self._device)),
            format_gib(torch.cuda.memory_reserved(self._device)),
            format_gib(torch.cuda.mem_get_info(self._device)[0]),
        )


class CountingStageMeter(StageMeter):
    """Counts live storages as they are made, for devices whose allocator keeps no peak."""

    def __init__(self, device: torch.device, storages: StorageMeter) -> None:
        super().__init__(device)
        self._storages = storages

    @property
    def peak_bytes(self) -> int:
        return self._storages.peak_bytes

    def restart_peak(self) -> None:
        self._storages.reset_peak()

    def weights(self, module: nn.Module) -> AbstractContextManager[None]:
        return self._storages.counted(module)

    @contextmanager
    def paused(self) -> Generator[None]:
        with super().paused():
            self._storages.__exit__(None, None, None)  # pyright: ignore[reportUnknownMemberType]
            try:
                yield
            finally:
                self._storages.__enter__()

    def log_step(self, step: int) -> None:
        logger.debug(
            "step %d: allocated %s, peak %s",
            step,
            format_gib(self._storages.current_bytes),
            format_gib(self._storages.peak_bytes),
        )


@contextmanager
def stage_meter(device: torch.device, limit_bytes: int | None = None) -> Generator[StageMeter]:
    """Measures what runs inside. `limit_bytes` emulates a card of that size, on a device that is not a real card."""
    if device.type == "cuda":
        assert limit_bytes is None, "a real card has its own limit"
        meter: StageMeter = CudaStageMeter(device)
        try:
            yield meter
        finally:
            meter.stop()
        return
    with StorageMeter(device_type=device.type, limit_bytes=limit_bytes) as storages:
        meter = CountingStageMeter(device, storages)
        try:
            yield meter
        finally:
            meter.stop()
