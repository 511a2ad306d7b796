"""One stage under way: components are placed as the plan says, and what they take is measured."""

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
from ..memory.device import is_out_of_memory
from ..memory.stage_meter import StageMeter, stage_meter
from ..placement.offload import give_pinned_back
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
    """Made by `running`. `plan` is what the stage goes by; `step_down` gives it another in the middle."""

    def __init__(self, stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime, meter: StageMeter) -> None:
        self.model, self.plan, self.runtime, self.meter = model, plan, runtime, meter
        self._stage = stage
        self._notes: list[str] = []
        self._failed: list[tuple[int, int]] = []
        self._made_room = False
        self._pace = Pace()

    @contextmanager
    def place(self, component: str, *, by_layer: bool = False) -> Generator[Placed]:
        """The component on the device, or coming there leaf by leaf or layer by layer where the plan streams it."""
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
        """After an out-of-memory: go on in the fastest way that takes less; if there is none, with room that the host
        makes, once. To be called outside of the `except`, whose traceback keeps what the failed layer had made.

        Args:
            problem: the error's own words.
            where: how far the stage had come, such as `at step 3 of 20`.

        Raises:
            RanOutError: there is nothing left to try.
        """
        _give_back(self.runtime.device)
        self._failed.append((self.plan.prediction(self._stage).peak_bytes, self.meter.peak_bytes))
        lower = next_fallback(self.plan, self._stage)
        if lower is not None:
            changed = what_changed(self.plan, lower, self._stage)
            self.note(f"{self._stage.value} ran out of device memory {where} and went on from there with {changed}")
            self.plan = lower
        elif not self._made_room:
            self._made_room = True
            self.note(f"{self._stage.value} ran out of device memory {where}: the host was asked to free what it can")
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
        """The steps, or frames, after `done` begin, by the plan as it is now."""
        self._pace.begin(done)
        self._show(done, total)

    def progress(self, done: int, total: int, latents_BCTHW: Tensor | None = None) -> None:
        """`done` of `total` are done. What the caller does with that neither counts nor is timed; not to be called
        while the meter is paused.
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
        """Something that the user should know of the run."""
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
    """What `attempt` gives, which is tried again a rung lower each time that it runs out of device memory."""
    while True:
        try:
            return attempt()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            problem = str(error)
        run.fall_back(problem, where())


def _give_back(device: torch.device) -> None:
    """Hand what the failed attempt has left in the allocator back to the device."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device)  # an error of CUDA's own is reported again with the next operation
    except RuntimeError as error:
        logger.debug("the device said again: %s", error)
    torch.cuda.empty_cache()


@contextmanager
def _pinned_given_back(device: torch.device) -> Generator[None]:
    """What a stage has pinned would be missing to others, and to the next plan, which goes by the free host memory."""
    try:
        yield
    finally:
        if device.type == "cuda":
            give_pinned_back()


@contextmanager
def running(stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime) -> Generator[StageRun]:
    plan.check_made_for(model.architecture)
    with torch.no_grad(), _pinned_given_back(runtime.device), stage_meter(runtime.device) as meter:

        def check_cancelled() -> None:
            meter.sample()
            runtime.check_cancelled()

        yield StageRun(stage, model, plan, replace(runtime, check_cancelled=check_cancelled), meter)
