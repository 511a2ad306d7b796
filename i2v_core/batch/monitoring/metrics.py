"""Metrics of a batch: what it has done, remarks where a value is out of range, and a text for Prometheus."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from ...units import format_gib
from ...words import Message, message
from ..devices.device import DeviceStatus
from .events import Event, EventKind, Span
from .leak_detector import HOST, LeakDetector, MemoryTrend, held_now

_HEALTHY_OCCUPANCY, _HEALTHY_UTILISATION, _HEALTHY_WAITING = 0.90, 0.70, 0.10
_MIN_SECONDS = 60.0
"""Shares of a shorter time tell little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReading:
    """Reading of a card by NVML."""

    occupancy: float
    """Share of its memory that is in use, 0…1."""
    utilisation: float
    """Share of the time that it computes, 0…1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchMetrics:
    """Metrics of a batch so far."""

    seconds: float
    done: int
    failed: int
    retries: int
    devices_lost: int
    waiting_share: float
    """Share of the stages' time, waits included, that they waited for memory."""
    reserved_share: float
    """Share of the devices' usable memory that running stages have reserved."""
    occupancy: float | None = None
    """Highest of any card; None without readings."""
    utilisation: float | None = None
    """Mean of the card that was idle most; None without readings."""
    held: tuple[MemoryTrend, ...] = ()
    """Memory held between jobs, of the host and of each card that jobs ran on."""

    @property
    def jobs_an_hour(self) -> float:
        return 3600 * self.done / self.seconds if self.seconds else 0.0

    def out_of_range(self) -> tuple[Message, ...]:
        """Remarks on values that are out of their healthy range, each with its likely cause."""
        remarks = [_leak(trend) for trend in self.held if trend.suspected]
        if self.occupancy is not None and self.occupancy > _HEALTHY_OCCUPANCY:
            remarks.append(_share("remarkOccupancy", self.occupancy, _HEALTHY_OCCUPANCY))
        if self.seconds < _MIN_SECONDS:
            return tuple(remarks)
        if self.utilisation is not None and self.utilisation < _HEALTHY_UTILISATION:
            remarks.append(_share("remarkUtilisation", self.utilisation, _HEALTHY_UTILISATION))
        if self.waiting_share > _HEALTHY_WAITING:
            remarks.append(_share("remarkWaiting", self.waiting_share, _HEALTHY_WAITING))
        if self.failed > self.done:
            remarks.append(message("remarkFailed", failed=self.failed, done=self.done))
        return tuple(remarks)

    def prometheus(self) -> str:
        """The metrics in Prometheus' text format, version 0.0.4."""
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
        lines = [
            f"# TYPE i2v_batch_{name} {kind}\ni2v_batch_{name} {value}\n"
            for name, (kind, value) in values.items()
            if value is not None
        ]
        return "".join([*lines, *self._held_lines()])

    def _held_lines(self) -> Iterator[str]:
        """Metrics of memory held between jobs, each with a line for each place."""
        metrics: dict[str, Callable[[MemoryTrend], float]] = {
            "held_bytes": lambda it: it.held_bytes,
            "held_growth_bytes_per_job": lambda it: it.growth_bytes,
            "leak_suspected": lambda it: int(it.suspected),
        }
        for name, value in metrics.items() if self.held else ():
            yield f"# TYPE i2v_batch_{name} gauge\n"
            yield from (f'i2v_batch_{name}{{place="{it.place}"}} {value(it)}\n' for it in self.held)


def _share(key: str, share: float, healthy: float) -> Message:
    return message(key, share=f"{share:.0%}", healthy=f"{healthy:.0%}")


def _leak(trend: MemoryTrend) -> Message:
    figures = {"amount": format_gib(round(trend.growth_bytes)), "jobs": len(trend.baselines)}
    if trend.place == HOST:
        return message("remarkHostLeak", **figures)
    return message("remarkCardLeak", card=trend.place, **figures)


class MetricsCollector:
    """Sums up an engine's events and spans. Its methods are called from the engine's threads.

    Args:
        kind_of: kind of a job by its id; jobs of a kind need the same memory.
        held: reads the bytes that are held now, by place.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        kind_of: Callable[[int], Hashable] = lambda _: None,
        held: Callable[[], Mapping[str, int]] = held_now,
    ) -> None:
        self._clock, self._began = clock, clock()
        self._kind_of, self._held = kind_of, held
        self._leaks = LeakDetector()
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(EventKind, 0)
        self._busy_seconds = self._waited_seconds = 0.0
        self._readings: dict[int, list[CardReading]] = {}

    def on_event(self, event: Event) -> None:
        if event.kind is EventKind.DONE and event.job is not None:
            self._finished(event.device, event.job)
        with self._lock:
            self._counts[event.kind] += 1

    def on_span(self, span: Span) -> None:
        held = self._held()
        with self._lock:
            self._leaks.read(held)
            self._busy_seconds += span.seconds
            self._waited_seconds += span.waited_seconds

    def sample(self, cards: Mapping[int, CardReading]) -> None:
        """Add a reading of `read_cards`; call it from time to time."""
        held = self._held()
        with self._lock:
            self._leaks.read(held)
            for index, reading in cards.items():
                self._readings.setdefault(index, []).append(reading)

    def figures(self, devices: tuple[DeviceStatus, ...] = ()) -> BatchMetrics:
        """Metrics so far. `devices` come from `Engine.status`."""
        with self._lock:
            all_seconds = self._busy_seconds + self._waited_seconds
            usable_bytes = sum(it.room.usable_bytes for it in devices)
            utilisations = [fmean(it.utilisation for it in readings) for readings in self._readings.values()]
            occupancies = [it.occupancy for readings in self._readings.values() for it in readings]
            return BatchMetrics(
                seconds=self._clock() - self._began,
                done=self._counts[EventKind.DONE],
                failed=self._counts[EventKind.FAILED],
                retries=self._counts[EventKind.RETRY],
                devices_lost=self._counts[EventKind.DEVICE_LOST],
                waiting_share=self._waited_seconds / all_seconds if all_seconds else 0.0,
                reserved_share=sum(it.reserved_bytes for it in devices) / usable_bytes if usable_bytes else 0.0,
                occupancy=max(occupancies, default=None),
                utilisation=min(utilisations, default=None),
                held=self._leaks.trends(),
            )

    def _finished(self, device: str, job: int) -> None:
        kind, held = self._kind_of(job), self._held()
        with self._lock:
            self._leaks.read(held)
            self._leaks.finished(device, kind)


def read_cards() -> dict[int, CardReading]:
    """Read every NVIDIA card of this machine, by its index; empty without nvidia-ml-py, a driver or a card."""
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
