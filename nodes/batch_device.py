"""The host's device as the engine of I2V Batch uses it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import comfy.model_management as management
import torch

from ..i2v_core.batch.devices import LocalDevice
from ..i2v_core.families import Architecture
from ..i2v_core.memory.device import DeviceFacts
from ..i2v_core.planning.plan import Plan, Stage
from ..i2v_core.planning.request import Budget
from . import host


class HostDevice(LocalDevice):
    """For one batch, which has the device to itself: the host's own models are unloaded before it."""

    def facts(self, architecture: Architecture) -> DeviceFacts:
        return host.plan_device(architecture)

    @contextmanager
    def stage(self, stage: Stage, plan: Plan) -> Generator[None]:
        # The host runs nodes so, and thus the weights that I2V Loader has made; the mode is each thread's own.
        with torch.inference_mode(), LocalDevice.stage(self, stage, plan):
            yield

    def make_room(self) -> None:
        management.soft_empty_cache()


def host_device(budget: Budget) -> HostDevice:
    """Within what a plan's budget names; what is merely free is read anew for each stage."""
    return HostDevice(
        torch_device=host.unload_everything(),
        limit_bytes=budget.limit_bytes,
        reserve_bytes=budget.reserve_bytes,
        attention=host.attention_backend(),
        calibration=host.calibration_store(),
    )
