"""The host's device and the machine's other cards, as devices for the batch engine."""

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
    """A device for one batch, which has it to itself: the host's own models are unloaded first."""

    def facts(self, architecture: Architecture) -> DeviceFacts:
        return host.plan_device(architecture, self.torch_device)

    @contextmanager
    def stage(self, stage: Stage, plan: Plan) -> Generator[None]:
        # The host runs nodes in inference mode, so I2V Loader's weights are inference tensors; the mode is per thread.
        with torch.inference_mode(), LocalDevice.stage(self, stage, plan):
            yield

    def make_room(self) -> None:
        management.soft_empty_cache()


def host_devices(budget: Budget, *, all_cards: bool) -> list[HostDevice]:
    """Return the host's own device, or all cards, each limited to the plan's budget.

    Free memory is not fixed here: it is read again before each stage.
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
