"""Measuring a stage's memory and time: from the allocator on a GPU, by counting live storages elsewhere."""

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
from .timeline import Timeline, TimelineRecorder

logger = logging.getLogger(__name__)

_SAMPLE_EVERY_SECONDS = 0.01


class StageMeter(ABC):
    """Measures the bytes that one stage has in use on its device, over time, and its seconds. Made by `stage_meter`.

    Counted are the weights that the stage places (see `weights`) and the tensors that it allocates.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before_seconds, self._since = 0.0, time.perf_counter()
        self._running = True
        self._recorder = TimelineRecorder()

    @property
    @abstractmethod
    def peak_bytes(self) -> int:
        """Peak bytes of the current attempt."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes in use now."""

    @property
    def seconds(self) -> float:
        """Seconds that the stage has run, pauses left out."""
        return self._before_seconds + (time.perf_counter() - self._since if self._running else 0.0)

    @property
    def timeline(self) -> Timeline:
        """Memory in use over time, of all attempts."""
        return self._recorder.timeline()

    def sample(self) -> None:
        """Read the memory in use, on devices where changes are not seen as they happen. To be called often."""
        return

    def restart_peak(self) -> None:
        """Start a new peak for a new attempt; the timeline keeps the old one."""
        self._recorder.restart(self.seconds)

    @abstractmethod
    def log_step(self, step: int) -> None:
        """Log the memory in use after a step, at debug level."""

    def weights(self, module: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        """Count a module's weights within the context, where placing them allocated nothing (on the CPU)."""
        return nullcontext()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Count neither time nor storages within the context, which must be in the stage's thread."""
        self.stop()
        try:
            yield
        finally:
            self._since, self._running = time.perf_counter(), True

    def stop(self) -> None:
        """Stop the clock."""
        self._before_seconds, self._running = self.seconds, False


class CudaStageMeter(StageMeter):
    """Reads PyTorch's caching allocator, relative to what was allocated when the stage began.

    Each sample resets the allocator's own peak, so that the timeline misses no peak between samples.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._peak_bytes = 0
        self._sampled_seconds = 0.0
        torch.cuda.reset_peak_memory_stats(device)
        self._before_bytes = torch.cuda.memory_allocated(device)

    @property
    def peak_bytes(self) -> int:
        return max(self._peak_bytes, self._allocator_peak_bytes()) if self._running else self._peak_bytes

    @property
    def used_bytes(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._before_bytes

    def sample(self) -> None:
        # Reading the allocator takes about as long as a small kernel, so it is not read at every call.
        if self.seconds - self._sampled_seconds >= _SAMPLE_EVERY_SECONDS:
            self._sample()

    def restart_peak(self) -> None:
        self._sample()
        self._peak_bytes = 0
        super().restart_peak()

    @contextmanager
    def paused(self) -> Generator[None]:
        with super().paused():
            try:
                yield
            finally:
                torch.cuda.reset_peak_memory_stats(self._device)

    def stop(self) -> None:
        self._sample()
        super().stop()

    def log_step(self, step: int) -> None:
        logger.debug(
            "step %d: allocated %s, reserved %s, free %s",
            step,
            format_gib(torch.cuda.memory_allocated(self._device)),
            format_gib(torch.cuda.memory_reserved(self._device)),
            format_gib(torch.cuda.mem_get_info(self._device)[0]),
        )

    def _allocator_peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before_bytes

    def _sample(self) -> None:
        peak_bytes = self._allocator_peak_bytes()
        self._peak_bytes = max(self._peak_bytes, peak_bytes)
        self._sampled_seconds = self.seconds
        self._recorder.record(self._sampled_seconds, max(self.used_bytes, 0), meanwhile_bytes=peak_bytes)
        torch.cuda.reset_peak_memory_stats(self._device)


class CountingStageMeter(StageMeter):
    """Counts live storages as they are allocated, for devices whose allocator keeps no peak."""

    def __init__(self, device: torch.device, storages: StorageMeter) -> None:
        super().__init__(device)
        self._storages = storages
        storages.on_change = self._on_change

    @property
    def peak_bytes(self) -> int:
        return self._storages.peak_bytes

    @property
    def used_bytes(self) -> int:
        return self._storages.current_bytes

    def restart_peak(self) -> None:
        super().restart_peak()
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

    def stop(self) -> None:
        self._on_change(self.used_bytes)
        super().stop()

    def log_step(self, step: int) -> None:
        logger.debug(
            "step %d: allocated %s, peak %s",
            step,
            format_gib(self._storages.current_bytes),
            format_gib(self._storages.peak_bytes),
        )

    def _on_change(self, used_bytes: int) -> None:
        # Storages that are freed during a pause are recorded at its start, since the clock stands still in it.
        self._recorder.record(self.seconds, used_bytes)


@contextmanager
def stage_meter(device: torch.device, limit_bytes: int | None = None) -> Generator[StageMeter]:
    """Measure the stage that runs within the context.

    Args:
        device: the device that the stage runs on.
        limit_bytes: the size of a card to emulate, on a device that is no real card.
    """
    if device.type == "cuda":
        assert limit_bytes is None, "a CUDA device has a limit of its own"
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
            storages.on_change = None
