"""Chooses between one thread and all: on a shared machine, a second thread can make a step five times slower.

The threads of one operation wait for each other, so a step is as slow as its slowest thread.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

_STAT = Path("/proc/stat")


class ThreadTuner:
    """Uses all cores while they are free, and one thread while they are not.

    Call ``tick`` once after every training step. On systems without /proc/stat, torch's own choice stays.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self._seconds = seconds
        self._cores = _usable_cores()
        self._mark()

    def tick(self) -> None:
        wall = time.perf_counter() - self._wall
        if wall < self._seconds or self._cores == 1 or not _STAT.exists():
            return
        ours = (time.process_time() - self._ours) / wall
        idle = (_idle_seconds() - self._idle) / wall
        threads = torch.get_num_threads()
        if threads > 1 and ours < 0.6 * threads:
            torch.set_num_threads(1)
        elif threads == 1 and idle > 0.7 * (self._cores - 1):
            torch.set_num_threads(self._cores)
        self._mark()

    def _mark(self) -> None:
        self._wall = time.perf_counter()
        self._ours = time.process_time()
        self._idle = _idle_seconds()


def _usable_cores() -> int:
    """Return the number of cores that this process may run on: fewer than the machine has if it is pinned."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _idle_seconds() -> float:
    """Return the idle time of all cores together since the system started."""
    if not _STAT.exists():
        return 0.0
    fields = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
    return float(fields[4]) / os.sysconf("SC_CLK_TCK")
