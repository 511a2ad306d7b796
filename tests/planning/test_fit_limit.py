"""The fit test: bytes of the device, with or without its margin, and of the host."""

from __future__ import annotations

import pytest

from i2v_core.errors import BadInputError
from i2v_core.memory.device import DeviceFacts
from i2v_core.memory.device_memory import DeviceMemory
from i2v_core.planning.fit_limit import FitLimit
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import Stage, StagePrediction
from i2v_core.planning.request import Budget
from i2v_core.units import GIB, MIB

CARD = DeviceFacts(device="cuda", name="a card", precisions=())
PREDICTION = StagePrediction(stage=Stage.DECODE, weights_bytes=GIB, activation_bytes=GIB, host_bytes=3 * GIB)


def test_the_margin_counts_only_for_a_device() -> None:
    needed = needed_bytes(PREDICTION, CARD)
    assert needed > PREDICTION.peak_bytes
    assert FitLimit(device_bytes=needed, margin_of=CARD).allows(PREDICTION)
    assert not FitLimit(device_bytes=needed - 1, margin_of=CARD).allows(PREDICTION)
    assert FitLimit(device_bytes=PREDICTION.peak_bytes).allows(PREDICTION)
    assert not FitLimit(device_bytes=PREDICTION.peak_bytes - 1).allows(PREDICTION)


def test_host_memory_counts_unless_any_amount_will_do() -> None:
    short = FitLimit(device_bytes=4 * GIB, host_bytes=3 * GIB - 1)
    assert not short.allows(PREDICTION)
    assert short.any_host.allows(PREDICTION)


@pytest.mark.parametrize("limit_bytes", [None, 2 * GIB, 8 * GIB])
def test_a_budget_and_the_memory_it_was_read_from_agree(limit_bytes: int | None) -> None:
    memory = DeviceMemory(free_bytes=4 * GIB, limit_bytes=limit_bytes, reserve_bytes=256 * MIB, others_bytes=GIB)
    budget = Budget.of(memory, host_free_bytes=5 * GIB)
    assert budget.usable_bytes == memory.usable_bytes == min(4 * GIB, limit_bytes or 4 * GIB) - 256 * MIB
    limit = FitLimit.of(budget, CARD)
    assert (limit.device_bytes, limit.host_bytes) == (memory.usable_bytes, 5 * GIB)


def test_no_budget_where_others_hold_everything() -> None:
    full = DeviceMemory(free_bytes=MIB, reserve_bytes=2 * MIB)
    assert full.usable_bytes == 0
    with pytest.raises(BadInputError, match="leaves nothing"):
        Budget.of(full, host_free_bytes=None)
