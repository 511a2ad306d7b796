"""The memory that calls take on a CUDA device, read from PyTorch's allocator."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


class PeakReading:
    """The highest use of the calls so far, beside what was allocated before each; None where it cannot be read."""

    def __init__(self) -> None:
        self.peak_bytes: int | None = None

    @contextmanager
    def around(self, device: torch.device) -> Generator[None]:
        if device.type != "cuda":
            yield
            return
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield
        self.peak_bytes = max(self.peak_bytes or 0, torch.cuda.max_memory_allocated(device) - before)
