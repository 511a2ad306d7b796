"""One stage under way: components are placed as the plan says, and what they take is measured."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager

import torch

from ..chunking import LayerRunner
from ..families import I2VModel, Placed
from ..memory.stage_meter import StageMeter, stage_meter
from ..placement.placed import placed
from ..placement.storage import WeightStorage, resident
from ..placement.streaming import streamed, streamed_leaves
from ..planning.margin import expected_bytes, uncertainty_bytes
from ..planning.plan import Plan, Stage
from ..planning.predict import component_dtype
from .runtime import Runtime, StageReport

logger = logging.getLogger(__name__)


class StageRun:
    """Made by `running`. `plan` is what the stage goes by; `adopt` gives it another in the middle."""

    def __init__(self, stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime, meter: StageMeter) -> None:
        self.model, self.plan, self.runtime, self.meter = model, plan, runtime, meter
        self._stage = stage
        self._notes: list[str] = []

    @contextmanager
    def place(self, component: str, *, by_layer: bool = False) -> Generator[Placed]:
        """The component on the device, or coming there leaf by leaf or layer by layer where the plan streams it."""
        self.runtime.check_cancelled()
        module, device = self.model.modules[component], self.runtime.device
        dtype = component_dtype(self.model.architecture, component, self.plan.sample.compute_dtype)
        storage = self.plan.sample.weight_storage if self._stage is Stage.SAMPLE else WeightStorage.AS_COMPUTED

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

    def adopt(self, plan: Plan, note: str) -> None:
        """Go on with another plan; `note` says why. The peak is measured anew."""
        logger.warning("%s", note)
        self._notes.append(note)
        self.plan = plan
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        self.meter.restart_peak()

    def report(self) -> StageReport:
        prediction = self.plan.stage(self._stage)
        report = StageReport(
            stage=self._stage,
            plan=self.plan,
            predicted_peak_bytes=expected_bytes(prediction, self.plan.device),
            uncertainty_bytes=uncertainty_bytes(prediction, self.plan.device),
            measured_peak_bytes=self.meter.peak_bytes,
            seconds=self.meter.seconds,
            notes=tuple(self._notes),
        )
        logger.info("%s", report)
        return report

    @property
    def _streamed(self) -> bool:
        settings = {Stage.ENCODE: self.plan.encode, Stage.SAMPLE: self.plan.sample, Stage.DECODE: self.plan.decode}
        return settings[self._stage].streamed


@contextmanager
def running(stage: Stage, model: I2VModel, plan: Plan, runtime: Runtime) -> Generator[StageRun]:
    plan.check_made_for(model.architecture)
    with torch.no_grad(), stage_meter(runtime.device) as meter:
        yield StageRun(stage, model, plan, runtime, meter)
