"""The host's device, and the machine's other cards, as the engine of I2V Batch uses them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import comfy.model_management as management
import torch

from ..i2v_core.batch.devices.device import LocalDevice
from ..i2v_core.families import Architecture
from ..i2v_core.memory.device import DeviceFacts
from ..i2v_core.planning.plan import Plan, Stage
from ..i2v_core.planning.request import Budget
from . import host


class HostDevice(LocalDevice):
    """For one batch, which has the device to itself: the host's own models are unloaded before it."""

    def facts(self, architecture: Architecture) -> DeviceFacts:
        return host.plan_device(architecture, self.torch_device)

    @contextmanager
    def stage(self, stage: Stage, plan: Plan) -> Generator[None]:
        # The host runs nodes so, and thus the weights that I2V Loader has made; the mode is each thread's own.
        with torch.inference_mode(), LocalDevice.stage(self, stage, plan):
            yield

    def make_room(self) -> None:
        management.soft_empty_cache()


def host_devices(budget: Budget, *, all_cards: bool) -> list[HostDevice]:
    """The host's own device, or every card beside it, each within what a plan's budget names; what is merely free is
    read anew for each stage.
    """
    own = host.unload_everything()
    cards = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if own.type == "cuda" else []
    others = [card for card in cards if card != own] if all_cards else []
    return [
        HostDevice(
            torch_device=device,
            limit_bytes=budget.limit_bytes,
            reserve_bytes=budget.reserve_bytes,
            attention=host.attention_backend(),
            calibration=host.calibration_store(),
        )
        for device in (own, *others)
    ]
