"""The memory that calls take on a CUDA device, read from PyTorch's allocator."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from ...i2v_core.memory.timeline import Timeline, TimelineRecorder

OnPeak = Callable[[int, bool], None]
"""Takes the bytes that a call took beside what was there before it, and whether it ended well."""


class RunMeter:
    """Reads the peak of each call of a run. Devices other than CUDA have no such reading."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._recorder = TimelineRecorder()

    @property
    def seconds(self) -> float:
        """Seconds since construction."""
        return time.perf_counter() - self._since

    @property
    def timeline(self) -> Timeline:
        """Memory that calls took beside the weights, over time."""
        return self._recorder.timeline()

    @contextmanager
    def around(self, device: torch.device, on_peak: OnPeak) -> Generator[None]:
        """Hands the peak of the call within the context to `on_peak`."""
        if device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        completed = False
        try:
            yield
            completed = True
        finally:
            peak_bytes = torch.cuda.max_memory_allocated(device) - before
            left_bytes = max(0, torch.cuda.memory_allocated(device) - before)
            self._recorder.record(self.seconds, left_bytes, meanwhile_bytes=peak_bytes)
            if not completed:
                self._recorder.restart(self.seconds)
            on_peak(peak_bytes, completed)
