"""Plans made by several threads at once, and given up."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from i2v_core.families import Architecture, VideoSize, read_architecture
from i2v_core.memory.device import DeviceFacts
from i2v_core.planning.plan import StagePrediction
from i2v_core.planning.planner import find_plan, make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.search import lowest_memory_stages
from i2v_core.planning.trace import interruptible, trace_denoiser
from i2v_core.units import GIB

CPU = DeviceFacts(device="cpu", name="cpu", precisions=(torch.float32,))
WIDTHS = range(64, 64 + 8 * 8, 8)


@pytest.fixture(scope="module")
def architecture(tiny_folder: Path) -> Architecture:
    return read_architecture(tiny_folder)


def request_for(architecture: Architecture, width: int) -> Request:
    return Request(architecture=architecture, size=VideoSize(width_pixels=width, height_pixels=64, frames=5))


def test_threads_do_not_disturb_each_other(architecture: Architecture) -> None:
    """They share the model's skeleton, which is put in pieces while it is traced."""

    def stages(width: int) -> tuple[StagePrediction, ...]:
        return lowest_memory_stages(request_for(architecture, width), CPU)

    trace_denoiser.cache_clear()
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(stages, WIDTHS))
    trace_denoiser.cache_clear()
    assert together == [stages(width) for width in WIDTHS]


def test_a_plan_that_nobody_waits_for_is_given_up(architecture: Architecture) -> None:
    traces = 0

    def leave_at_the_third() -> None:
        nonlocal traces
        traces += 1
        if traces == 3:
            raise InterruptedError

    request, budget = request_for(architecture, 200), Budget(free_bytes=GIB)
    with pytest.raises(InterruptedError), interruptible(leave_at_the_third):
        make_plan(request, budget, CPU)
    assert traces == 3
    assert make_plan(request, budget, CPU) == find_plan(request, budget, CPU)


def test_nothing_is_found_where_nothing_fits(architecture: Architecture) -> None:
    assert find_plan(request_for(architecture, 64), Budget(free_bytes=1), CPU) is None
