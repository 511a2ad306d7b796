"""A running stage: places components as planned, measures memory and time, falls back when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ..chunking import LayerRunner
from ..errors import RanOutError
from ..families import I2VModel, Placed
from ..memory.device import empty_allocator_cache, is_out_of_memory
from ..memory.stage_meter import StageMeter, stage_meter
from ..placement.offload import release_pinned_memory
from ..placement.placed import placed
from ..placement.storage import WeightStorage, resident
from ..placement.streaming import streamed, streamed_leaves
from ..planning.fallback import next_fallback, remedy, what_changed
from ..planning.margin import expected_bytes, needed_bytes, uncertainty_bytes
from ..planning.plan import Plan, Stage
from ..planning.predict import component_dtype
from ..units import format_gib
from .runtime import Runtime, StageReport
from .status import Pace, StageStatus

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class StageRun:
    """Services for one stage while it runs. Made by `open_stage_run`.

    `plan` is the plan that applies now; `fall_back` replaces it with one that needs less memory.
    """

    def __init__(self, stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime, meter: StageMeter) -> None:
        self.model, self.plan, self.runtime, self.meter = model, plan, runtime, meter
        self._stage = stage
        self._notes: list[str] = []
        self._failed: list[tuple[int, int]] = []
        self._asked_host_for_memory = False
        self._pace = Pace()

    @contextmanager
    def place(self, component: str, *, by_layer: bool = False) -> Generator[Placed]:
        """Place a component on the device while the context lasts: whole, or streamed by leaf or layer as planned."""
        self.runtime.check_cancelled()
        module, device = self.model.modules[component], self.runtime.device
        dtype = component_dtype(self.model.architecture, component, self.plan.compute_dtype, self._stage)
        storage = self.plan.sample.settings.weight_storage if self._stage is Stage.SAMPLE else WeightStorage.AS_COMPUTED

        def ready(runner: LayerRunner) -> Placed:
            return Placed(module=module, device=device, dtype=dtype, runner=runner)

        if self._streamed and by_layer:
            with streamed(module, device, dtype, storage) as stream:
                yield ready(stream)
        elif self._streamed:
            with streamed_leaves(module, device, dtype):
                yield ready(LayerRunner())
        elif by_layer:
            with resident(module, device, dtype, storage) as runner, self.meter.weights(module):
                yield ready(runner)
        else:
            with placed(module, device, dtype), self.meter.weights(module):
                yield ready(LayerRunner())

    def fall_back(self, problem: str, where: str) -> None:
        """Switch to the fastest settings that need less memory, after an attempt ran out of it.

        If there are none, the host is asked once to free memory. Call this outside of the `except` block: its traceback
        keeps the tensors of the failed layer alive.

        Args:
            problem: the error's message.
            where: the progress so far, such as `at step 3 of 20`.

        Raises:
            RanOutError: there is nothing left to try.
        """
        empty_allocator_cache(self.runtime.device)
        self._failed.append((self.plan.prediction(self._stage).peak_bytes, self.meter.peak_bytes))
        lower = next_fallback(self.plan, self._stage)
        if lower is not None:
            changed = what_changed(self.plan, lower, self._stage)
            self.note(f"{self._stage.value} ran out of device memory {where} and continued with {changed}")
            self.plan = lower
        elif not self._asked_host_for_memory:
            self._asked_host_for_memory = True
            self.note(f"{self._stage.value} ran out of device memory {where}: the host was asked to free memory")
            self.runtime.make_room()
        else:
            raise self._nothing_left(problem, where)
        self.meter.restart_peak()

    def _nothing_left(self, problem: str, where: str) -> RanOutError:
        needed = format_gib(needed_bytes(self.plan.prediction(self._stage), self.plan.device))
        free_bytes = self.runtime.free_bytes()
        free = "" if free_bytes is None else f", and {format_gib(free_bytes)} are free"
        return RanOutError(
            f"{self._stage.value} ran out of device memory {where}, even with the lowest-memory settings: it needs "
            f"{needed}{free} ({problem})",
            remedy(self.plan, self._stage),
        )

    def begin(self, done: int, total: int) -> None:
        """Announce that the steps (or frames) after `done` begin, under the current plan."""
        self._pace.begin(done)
        self._show(done, total)

    def progress(self, done: int, total: int, latents_BCTHW: Tensor | None = None) -> None:
        """Announce that `done` of `total` are done.

        The caller's callback is neither measured nor timed. Must not be called while the meter is paused.
        """
        self._pace.record(done)
        self._show(done, total)
        with self.meter.paused():
            self.runtime.on_progress(done, total, latents_BCTHW)

    def _show(self, done: int, total: int) -> None:
        self.runtime.on_status(
            StageStatus(
                stage=self._stage,
                done=done,
                total=total,
                seconds=self._pace.seconds,
                seconds_each=self._pace.seconds_each,
                used_bytes=self.meter.used_bytes,
                peak_bytes=self.meter.peak_bytes,
                usable_bytes=self.plan.budget.usable_bytes,
                notes=tuple(self._notes),
            )
        )

    def note(self, note: str) -> None:
        """Record something that the user should know about the run."""
        logger.warning("%s", note)
        self._notes.append(note)

    def report(self) -> StageReport:
        prediction = self.plan.prediction(self._stage)
        report = StageReport(
            stage=self._stage,
            plan=self.plan,
            predicted_peak_bytes=expected_bytes(prediction, self.plan.device),
            uncertainty_bytes=uncertainty_bytes(prediction, self.plan.device),
            measured_peak_bytes=self.meter.peak_bytes,
            seconds=self.meter.seconds,
            timeline=self.meter.timeline,
            notes=tuple(self._notes),
            failed=tuple(self._failed),
        )
        logger.info("%s", report)
        return report

    @property
    def _streamed(self) -> bool:
        return self.plan.stages[self._stage].settings.streamed


def retry_with_fallback(run: StageRun, attempt: Callable[[], Result], where: Callable[[], str]) -> Result:
    """Return the result of `attempt`, repeating it with lower-memory settings whenever device memory runs out."""
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error)
        run.fall_back(problem, where())


@contextmanager
def _releasing_pinned_memory(device: torch.device) -> Generator[None]:
    """Free the stage's pinned host memory on exit: the next plan goes by the host memory that is free."""
    try:
        yield
    finally:
        if device.type == "cuda":
            release_pinned_memory()


@contextmanager
def open_stage_run(stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime) -> Generator[StageRun]:
    """Start measuring a stage, and release what it holds on exit. The body runs the stage.

    Raises:
        PlanMismatchError: the plan was made for another model.
    """
    plan.check_made_for(model.architecture)
    with torch.no_grad(), _releasing_pinned_memory(runtime.device), stage_meter(runtime.device) as meter:

        def check_cancelled() -> None:
            meter.sample()
            runtime.check_cancelled()

        yield StageRun(stage, model, plan, replace(runtime, check_cancelled=check_cancelled), meter)
