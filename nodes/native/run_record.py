"""Record of a sampler's run: the memory that its calls took, and what happened; for the user, and for later plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ...i2v_core.planning.plan import Stage
from ...i2v_core.sampling.sysmem_fallback import SysmemFallbackDetector
from ...i2v_core.units import format_gib
from .call_plan import CallPlan
from .measured import RunMeter

FreeBytes = Callable[[], "int | None"]


class RunRecord:
    """Collects the peaks of a run's calls, its fallbacks and its warnings.

    Args:
        free_bytes: reads the device memory that nobody holds; None where that is not known.
    """

    def __init__(self, free_bytes: FreeBytes) -> None:
        self.notes: list[str] = []
        """Events that the user should know of."""
        self._meter = RunMeter()
        self._peaks: dict[Hashable, tuple[CallPlan, int]] = {}
        self._exceeded: list[tuple[CallPlan, int]] = []
        self._retries: list[dict[str, int]] = []
        self._free_bytes = free_bytes
        self._detector: SysmemFallbackDetector | None = None
        self._steps, self._calls = 0, 0

    def call(self, key: Hashable, plan: CallPlan, device: torch.device) -> AbstractContextManager[None]:
        """Measures the call within the context.

        Args:
            key: equal for calls of the same shapes.
            plan: by which it runs.
        """

        self._calls += 1

        def on_peak(peak_bytes: int, completed: bool) -> None:
            if completed:
                _, before = self._peaks.get(key, (plan, 0))
                self._peaks[key] = plan, max(before, peak_bytes)
                return
            self._retries.append({"predicted_peak_bytes": plan.expected_bytes, "measured_peak_bytes": peak_bytes})
            # What a failed call took says something only where that was more than predicted already.
            if peak_bytes > plan.peak_bytes:
                self._exceeded.append((plan, peak_bytes))

        return self._meter.around(device, on_peak)

    def begin_step(self) -> str | None:
        """Counts a step; a warning where the driver seems to have put the last one's memory into the host's."""
        calls, self._calls = self._calls, 0
        if self._detector is None:
            self._detector = SysmemFallbackDetector(self._free_bytes)
            return None
        self._steps += 1
        if not calls:  # skipped by another node, or answered by an earlier run's record: others seem slow beside it
            self._detector.skip_step()
            return None
        return self._detector.after_step(self._steps)

    def predicted_and_measured(self) -> Iterator[tuple[int, int]]:
        """Predicted and measured peaks in bytes, one of each shape of call, and of calls that failed beyond theirs."""
        for plan, measured_bytes in (*self._exceeded, *self._peaks.values()):
            yield plan.peak_bytes, measured_bytes

    def text(self, plan: CallPlan) -> str:
        """Text that shows what a call took, beside its prediction and what core's own would take."""
        measured = self._largest()
        taken = "" if measured is None else f", measured {format_gib(measured[1])}"
        plan = plan if measured is None else measured[0]
        line = (
            f"sampled: predicted {format_gib(plan.expected_bytes)} ± {format_gib(plan.uncertainty_bytes)} of "
            f"activations a call{taken}, core's own {format_gib(plan.stock_bytes)}"
        )
        return "\n".join([line, str(plan), *self.notes])

    def report(self, latent_shape: Sequence[int]) -> dict[str, Any] | None:
        """The run as `run_report.StageFigures.from_dict` takes it; None where nothing was measured."""
        measured = self._largest()
        if measured is None:
            return None
        plan, peak_bytes = measured
        return {
            "stage": Stage.SAMPLE.value,
            "latent_shape": list(latent_shape),
            "predicted_peak_bytes": plan.expected_bytes,
            "uncertainty_bytes": plan.uncertainty_bytes,
            "measured_peak_bytes": peak_bytes,
            "stock_peak_bytes": plan.stock_bytes,
            "usable_bytes": plan.usable_bytes - plan.resident_bytes,
            "seconds": round(self._meter.seconds, 3),
            "retries": self._retries,
            "timeline": self._meter.timeline.as_dict(),
            "notes": self.notes,
        }

    def _largest(self) -> tuple[CallPlan, int] | None:
        """The plan and the peak of the call that took the most; None where none was measured."""
        return max(self._peaks.values(), key=lambda it: it[1], default=None)
