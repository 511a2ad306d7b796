"""This machine's devices as the engine sees them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from i2v_core.batch.devices.device import (
    DeviceLostError,
    LocalDevice,
    is_device_failure,
    local_devices,
    with_model_loaded,
)
from i2v_core.families import I2VModel, bundled_architecture
from i2v_core.memory.calibration import CalibrationStore
from i2v_core.memory.device_memory import DeviceMemory
from i2v_core.planning.request import Budget
from i2v_core.units import GIB, MIB

CPU = torch.device("cpu")


def test_a_limit_is_on_what_the_batch_takes_whatever_others_hold() -> None:
    limited = LocalDevice(torch_device=CPU, limit_bytes=64 * MIB, reserve_bytes=16 * MIB)
    assert limited.room().usable_bytes == 48 * MIB
    whole = LocalDevice(torch_device=CPU)
    assert whole.room().usable_bytes > 64 * MIB
    assert whole.room().others_bytes > 0


def test_plans_are_made_for_what_is_left(tiny_model: I2VModel) -> None:
    limited = LocalDevice(torch_device=CPU, limit_bytes=64 * MIB, reserve_bytes=16 * MIB)
    budget = limited.budget(tiny_model.architecture)
    assert budget.usable_bytes == 48 * MIB
    assert budget.host_free_bytes is None  # on the CPU it is the device's own


def test_host_memory_is_less_by_the_model() -> None:
    budget = Budget(free_bytes=GIB, host_free_bytes=16 * GIB)
    left = with_model_loaded(budget, bundled_architecture("i2vgen-xl"))
    assert left.host_free_bytes is not None
    assert 4 * GIB < 16 * GIB - left.host_free_bytes < 7 * GIB
    assert (
        with_model_loaded(replace(budget, host_free_bytes=GIB), bundled_architecture("i2vgen-xl")).host_free_bytes == 0
    )


@pytest.mark.parametrize(
    ("error", "is_failure"),
    [
        (DeviceLostError("gone"), True),
        (RuntimeError("sizes do not match"), False),
        (torch.OutOfMemoryError(), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
    ],
    ids=str,
)
def test_what_a_device_does_not_survive(error: Exception, is_failure: bool) -> None:
    assert is_device_failure(error) is is_failure


def test_there_is_always_a_device(tmp_path: Path) -> None:
    devices = local_devices(GIB, 0, CalibrationStore(tmp_path / "calibration.json"))
    assert len({device.name for device in devices}) == len(devices) >= 1
    assert all(isinstance(device.room(), DeviceMemory) for device in devices)


@pytest.mark.gpu
def test_what_a_batch_holds_on_a_card_is_not_counted_as_others() -> None:
    device = LocalDevice(torch_device=torch.device("cuda:0"))
    before = device.room().others_bytes
    held = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda:0")
    assert abs(device.room().others_bytes - before) < 64 * MIB
    del held
