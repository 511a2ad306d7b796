"""A hundred runs in one process, some cancelled or failing, leave memory as they found it."""

from __future__ import annotations

import ctypes
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from i2v_core import stages
from i2v_core.errors import RanOutError
from i2v_core.families import I2VModel, Prompt, VideoSize, load_model
from i2v_core.memory.device import device_facts
from i2v_core.memory.leaks import LiveTensorReport, TensorTotals, live_tensors, traced
from i2v_core.planning.plan import Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.predict import with_settings
from i2v_core.planning.request import Budget, Request
from i2v_core.units import GIB, MIB

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS, WARM_UP = 100, 20
SIZES = [(64, 64, 2), (72, 64, 4), (64, 96, 3), (96, 72, 1)]
PROMPT = Prompt(image_FHWC=torch.rand(1, 70, 90, 3), text="a red circle", negative_text="blue", fps=8)


class StopError(Exception):
    """Raised by the caller to cancel."""


def quiet() -> None:
    """Let a run continue."""


def cancel() -> None:
    raise StopError


def run_out() -> None:
    raise torch.OutOfMemoryError("injected")


def at(call: int, act: Callable[[], None], *, again: bool = False) -> Callable[[], None]:
    """Return a function that calls `act` at the given call, or from then on."""
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == call or (again and calls > call):
            act()

    return check


def plans(model: I2VModel, device: torch.device) -> list[Plan]:
    """Make plans of several sizes: unchunked with resident weights, and chunked, streamed and with skips offloaded."""
    found: list[Plan] = []
    for width, height, frames in SIZES:
        size = VideoSize(width_pixels=width, height_pixels=height, frames=frames)
        request = Request(architecture=model.architecture, size=size, precision="fp32")
        plan = make_plan(request, Budget(free_bytes=GIB), device_facts(device))
        sample = replace(
            plan.sample.settings, streamed=True, offload_skips=True, workspace_bytes=MIB // 8, batched_guidance=False
        )
        streamed = with_settings(
            plan,
            encode=replace(plan.encode.settings, streamed=True),
            sample=sample,
            decode=replace(plan.decode.settings, streamed=True),
        )
        found += [plan, streamed]
    return found


def video(model: I2VModel, plan: Plan, runtime: stages.Runtime, *, as_stream: bool) -> Tensor:
    """Run all stages; return the frames."""
    settings = stages.SamplerSettings(steps=2, cfg=3.0, seed=1, scheduler="unipc")
    conditioning, _ = stages.encode(model, plan, PROMPT, runtime)
    samples, _ = stages.sample(model, plan, conditioning, settings, runtime)
    if not as_stream:
        return stages.decode(model, plan, samples, runtime)[0]
    with stages.decode_stream(model, plan, samples, runtime) as stream:
        return torch.cat(list(stream))


def runs(model: I2VModel, device: torch.device) -> Iterator[int]:
    """Yield the number of each finished run. About half of them fail; the others give the right frames."""
    choose = random.Random(0)
    all_plans = plans(model, device)
    runtime = stages.Runtime(device=device)
    expected = [video(model, plan, runtime, as_stream=False).cpu() for plan in all_plans]
    for number in range(RUNS):
        which = choose.randrange(len(all_plans))
        call = choose.randrange(1, 300)
        check = choose.choice([quiet, quiet, at(call, cancel), at(call, run_out), at(call, run_out, again=True)])
        with suppress(StopError, RanOutError):
            frames = video(
                model,
                all_plans[which],
                replace(runtime, check_cancelled=check),
                as_stream=choose.random() < 0.5,
            )
            torch.testing.assert_close(frames, expected[which], rtol=0, atol=1e-3)
            del frames
        yield number


def resident_bytes() -> int:
    """Return the process's resident host memory, after the C library has released what is free."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@contextmanager
def nothing_stays(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yield a callback for each finished run. Checks when the context ends that memory is as after the warm-up."""
    told: list[tuple[TensorTotals, int, int]] = []
    survivors = LiveTensorReport()

    def done(number: int) -> None:
        if number in (WARM_UP, RUNS - 1):
            allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            told.append((TensorTotals.of(live_tensors()), resident_bytes(), allocated))

    yield done
    (before, before_resident, before_allocated), (after, after_resident, after_allocated) = told
    assert after.tensors == before.tensors, survivors.report()
    assert abs(after.size_bytes - before.size_bytes) <= MIB, survivors.report()
    assert abs(after_allocated - before_allocated) <= MIB
    assert after_resident - before_resident <= 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_hundred_runs_leave_what_they_found(tiny_folder: Path, kind: str) -> None:
    device = torch.device(kind)
    model = load_model(tiny_folder)
    with nothing_stays(device) as done:
        for number in runs(model, device):
            done(number)


@pytest.mark.slow
def test_a_leak_is_found_and_named() -> None:
    with traced() as survivors:
        kept = [torch.ones(300, 100)]
        view = kept[0][:10]
        garbage = torch.ones(50)
        del garbage
        assert TensorTotals.of(survivors.tensors()) == TensorTotals(2, 300 * 100 * 4)
        report = survivors.report()
        assert "2 tensors of 0.1 MiB are alive that were not before" in report
        assert "(300, 100) in float32 on cpu, 117.2 KiB" in report
        assert f"made at {__file__}:" in report
        del kept, view
        assert survivors.tensors() == []
    assert not tracemalloc.is_tracing()
