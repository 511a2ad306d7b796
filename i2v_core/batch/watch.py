"""Whether a batch does well: figures of what it has done, named where they are out of range, also for Prometheus."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from .events import Event, EventKind, Span
from .settings import DeviceStatus

_HEALTHY_OCCUPANCY, _HEALTHY_UTILISATION, _HEALTHY_WAITING = 0.90, 0.70, 0.10
_TELLING_SECONDS = 60.0
"""Shares of a shorter time say little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReading:
    """What NVML says of a card: shares of its memory and of its time that are in use, 0…1."""

    occupancy: float
    utilisation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of a batch so far. `waiting_share` is of the time that stages took, waiting for room included.

    `occupancy` is the highest seen of any card, `utilisation` the mean of the card that was idle most; None where
    nothing is known of any.
    """

    seconds: float
    done: int
    failed: int
    retries: int
    devices_lost: int
    waiting_share: float
    reserved_share: float
    occupancy: float | None = None
    utilisation: float | None = None

    @property
    def jobs_an_hour(self) -> float:
        return 3600 * self.done / self.seconds if self.seconds else 0.0

    def out_of_range(self) -> tuple[str, ...]:
        """What is not as it should be, each with its likely cause."""
        found: list[str] = []
        if self.occupancy is not None and self.occupancy > _HEALTHY_OCCUPANCY:
            found.append(
                f"{self.occupancy:.0%} of device memory is in use (healthy: up to {_HEALTHY_OCCUPANCY:.0%}): other "
                "programs hold memory, or the reserve is too small"
            )
        if self.seconds < _TELLING_SECONDS:
            return tuple(found)
        if self.utilisation is not None and self.utilisation < _HEALTHY_UTILISATION:
            found.append(
                f"the device computes {self.utilisation:.0%} of the time (healthy: from {_HEALTHY_UTILISATION:.0%}): "
                "weights stream from host memory, or the processor or the disk cannot keep up"
            )
        if self.waiting_share > _HEALTHY_WAITING:
            found.append(
                f"stages wait for room {self.waiting_share:.0%} of their time (healthy: up to {_HEALTHY_WAITING:.0%}): "
                "jobs are too large to run beside one another"
            )
        if self.failed > self.done:
            found.append(f"{self.failed} jobs have failed and {self.done} are done: look at what the first ones say")
        return tuple(found)

    def prometheus(self) -> str:
        """In Prometheus' text format, version 0.0.4."""
        values = {
            "jobs_done_total": ("counter", self.done),
            "jobs_failed_total": ("counter", self.failed),
            "retries_total": ("counter", self.retries),
            "devices_lost_total": ("counter", self.devices_lost),
            "jobs_per_hour": ("gauge", self.jobs_an_hour),
            "waiting_share": ("gauge", self.waiting_share),
            "reserved_share": ("gauge", self.reserved_share),
            "vram_occupancy": ("gauge", self.occupancy),
            "gpu_utilisation": ("gauge", self.utilisation),
        }
        return "".join(
            f"# TYPE i2v_batch_{name} {kind}\ni2v_batch_{name} {value}\n"
            for name, (kind, value) in values.items()
            if value is not None
        )


class Watch:
    """Hears an engine's events and spans, from its threads, and sums them up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._turn = threading.Lock()
        self._counts = dict.fromkeys(EventKind, 0)
        self._busy_seconds = self._waited_seconds = 0.0
        self._readings: dict[int, list[CardReading]] = {}

    def hear(self, event: Event) -> None:
        with self._turn:
            self._counts[event.kind] += 1

    def ended(self, span: Span) -> None:
        with self._turn:
            self._busy_seconds += span.seconds
            self._waited_seconds += span.waited_seconds

    def sample(self, cards: Mapping[int, CardReading]) -> None:
        """What `read_cards` gives now; to be called from time to time."""
        with self._turn:
            for index, reading in cards.items():
                self._readings.setdefault(index, []).append(reading)

    def figures(self, devices: tuple[DeviceStatus, ...] = ()) -> Figures:
        """So far. `devices` are as `Engine.status` has them."""
        with self._turn:
            all_seconds = self._busy_seconds + self._waited_seconds
            ours_bytes = sum(it.room.ours_bytes for it in devices)
            utilisations = [fmean(it.utilisation for it in readings) for readings in self._readings.values()]
            occupancies = [it.occupancy for readings in self._readings.values() for it in readings]
            return Figures(
                seconds=self._clock() - self._began,
                done=self._counts[EventKind.DONE],
                failed=self._counts[EventKind.FAILED],
                retries=self._counts[EventKind.RETRY],
                devices_lost=self._counts[EventKind.DEVICE_LOST],
                waiting_share=self._waited_seconds / all_seconds if all_seconds else 0.0,
                reserved_share=sum(it.reserved_bytes for it in devices) / ours_bytes if ours_bytes else 0.0,
                occupancy=max(occupancies, default=None),
                utilisation=min(utilisations, default=None),
            )


def read_cards() -> dict[int, CardReading]:
    """Of every NVIDIA card of this machine, by its index; empty without nvidia-ml-py, a driver or a card."""
    if find_spec("pynvml") is None:
        return {}
    nvml: Any = import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return {}
    try:
        return {index: _reading(nvml, index) for index in range(nvml.nvmlDeviceGetCount())}
    except nvml.NVMLError:
        return {}
    finally:
        nvml.nvmlShutdown()


def _reading(nvml: Any, index: int) -> CardReading:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return CardReading(
        occupancy=memory.used / memory.total, utilisation=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
    )
