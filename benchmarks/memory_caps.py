"""Runs the whole pipeline under caps on device memory: predicted and measured peaks, speed, difference from stock.

    python benchmarks/memory_caps.py
    python benchmarks/memory_caps.py --size 1280x704x16 --cap 3 --cap 6 --steps 6

On a CUDA device every stage of a model of the published size runs in fp16 under
`torch.cuda.set_per_process_memory_fraction`. Memory and time do not depend on the values of weights, so these are
random; none is zero, so a mistake in chunking layers would show. A tokenizer's files are not needed either: the
encoders run on the inputs that prediction uses, and the conditioning is random numbers of the right shapes.

Without a CUDA device the table shows traced plans for such cards. Nothing is measured then, and both the table and the
JSON say so.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory_caps_rows import (
    MEASURED_HEADS,
    TRACED_HEADS,
    Row,
    StageRow,
    heading,
    measured_lines,
    traced_lines,
    write_json,
)
from benchmarks.random_model import (
    ARCHITECTURE,
    DENOISER,
    DTYPE,
    FAMILY,
    PRECISION,
    SEED,
    random_conditioning,
    random_model,
)
from i2v_core import stages
from i2v_core.errors import I2VError
from i2v_core.families import I2VModel, Placed, VideoSize
from i2v_core.memory.device import DeviceFacts, device_facts
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.placement.placed import placed
from i2v_core.placement.streaming import streamed
from i2v_core.planning.margin import needed_bytes
from i2v_core.planning.plan import Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.report import plan_as_dict
from i2v_core.planning.request import Budget, Request
from i2v_core.sampling.loop import Guidance, SampleLoop
from i2v_core.sampling.noise import initial_noise
from i2v_core.sampling.schedulers import make_scheduler
from i2v_core.stages.run import open_stage_run
from i2v_core.units import GIB

CAPS_GIB = (2, 3, 4, 6, 8, 12, 16, 24)
CFG = 9.0
RESULTS = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """Results of the plain forward: all weights on the device, both guidance branches in one pass, no cap."""

    size: str
    peak_bytes: int
    step_seconds: float
    latents: Tensor


class StepClock:
    """Measures the steps after the first, which warms up. `tick` ends a step."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def tick(self) -> None:
        torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    @property
    def step_seconds(self) -> float:
        return statistics.median(end - start for start, end in zip(self._ends, self._ends[1:], strict=False))


def empty_caches() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def run_stock(model: I2VModel, size: VideoSize, steps: int, device: torch.device) -> Stock | None:
    """Sample with the plain forward; None if the card is too small for it."""
    conditioning, clock = random_conditioning(size), StepClock()
    assert conditioning.negative is not None
    unet = model.modules[DENOISER]
    scheduler = make_scheduler(FAMILY.facts.scheduler("ddim"), ARCHITECTURE.config("scheduler"))
    scheduler.set_timesteps(steps)
    empty_caches()
    try:
        with torch.no_grad(), stage_meter(device) as meter, placed(unet, device, DTYPE):
            guidance = Guidance(
                lambda latents, timestep, inputs: FAMILY.denoise(unet, latents, timestep, inputs),
                {name: tensor.to(device, DTYPE) for name, tensor in conditioning.positive.items()},
                {name: tensor.to(device, DTYPE) for name, tensor in conditioning.negative.items()},
                CFG,
                batched=True,
            )
            noise = initial_noise(FAMILY.facts.latent_size(size), SEED).to(device) * scheduler.init_noise_sigma
            loop = SampleLoop(scheduler, noise, lambda *_: clock.tick())
            latents = loop.run(lambda at, timestep: guidance(at, timestep, DTYPE))
            samples = FAMILY.latents_to_host(ARCHITECTURE, latents, conditioning.positive).float().cpu()
        return Stock(size=str(size), peak_bytes=meter.peak_bytes, step_seconds=clock.step_seconds, latents=samples)
    except torch.OutOfMemoryError:
        return None


def run_encoders(model: I2VModel, plan: Plan, device: torch.device) -> int:
    """Run the encoders; return the measured peak of the encode stage."""
    request = plan.request
    workloads = FAMILY.encode_workloads(ARCHITECTURE, request.size, request.guidance, plan.encode.settings.tiling)
    with open_stage_run(Stage.ENCODE, model, plan, stages.Runtime(device=device)) as run:
        for workload in workloads:
            with run.place(workload.component, by_layer=workload.by_layer) as component:
                for _ in range(workload.passes):
                    workload.run(component)
    return run.meter.peak_bytes


def weight_traffic(model: I2VModel, plan: Plan, device: torch.device) -> float:
    """Return the weights copied in one denoiser pass, once the order of layers is known, over the denoiser's size."""
    unet = model.modules[DENOISER]
    branches = plan.request.branches if plan.sample.settings.batched_guidance else 1
    workload = FAMILY.denoise_workload(ARCHITECTURE, plan.request.size, branches)
    loaded_bytes: list[int] = []
    with (
        torch.no_grad(),
        streamed(unet, device, DTYPE) as stream,
        FAMILY.chunked(unet, plan.sample.settings.chunk_settings, runner=stream, on_chunk=lambda: None),
    ):
        for _ in range(3):  # the second pass fetches the third's first layer ahead
            workload.run(Placed(module=unet, device=device, dtype=DTYPE, runner=stream))
            loaded_bytes.append(stream.loaded_bytes)
    size_bytes = sum(tensor.numel() * DTYPE.itemsize for tensor in unet.parameters())
    return (loaded_bytes[2] - loaded_bytes[1]) / size_bytes


def measured_stage(plan: Plan, stage: Stage, run: Callable[[], int]) -> StageRow:
    """Measure a stage. `run` runs it and returns its measured peak."""
    empty_caches()
    measured_bytes = run()
    predicted = plan.prediction(stage)
    return StageRow(
        stage=stage.value,
        predicted_bytes=predicted.peak_bytes,
        with_margin_bytes=needed_bytes(predicted, plan.device),
        measured_bytes=measured_bytes,
        reserved_bytes=torch.cuda.max_memory_reserved(),
        error=predicted.peak_bytes / measured_bytes - 1,
    )


def measured_row(model: I2VModel, plan: Plan, cap_gib: float, stock: Stock | None, steps: int) -> Row:
    """Run all stages of a plan under the cap that it was made for."""
    device, size, clock = plan.device.torch_device, plan.request.size, StepClock()
    runtime = stages.Runtime(device=device)
    sampling = stages.Runtime(device=device, on_progress=lambda *_: clock.tick())
    settings = stages.SamplerSettings(steps=steps, cfg=CFG, seed=SEED)
    conditioning, results = random_conditioning(size), dict[str, Tensor]()

    def sample() -> int:
        results["samples"], report = stages.sample(model, plan, conditioning, settings, sampling)
        return report.measured_peak_bytes

    def decode() -> int:
        _, report = stages.decode(model, plan, results["samples"], runtime)
        return report.measured_peak_bytes

    runs: dict[Stage, Callable[[], int]] = {
        Stage.ENCODE: lambda: run_encoders(model, plan, device),
        Stage.SAMPLE: sample,
        Stage.DECODE: decode,
    }
    rows = tuple(measured_stage(plan, stage, run) for stage, run in runs.items())
    return Row(
        size=str(size),
        cap_gib=cap_gib,
        settings=choices(plan),
        stages=rows,
        step_seconds=clock.step_seconds,
        ratio_to_stock=clock.step_seconds / stock.step_seconds if stock else None,
        difference_from_stock=relative_rms(results["samples"], stock.latents) if stock else None,
        traffic=weight_traffic(model, plan, device) if plan.sample.settings.streamed else None,
    )


def relative_rms(result: Tensor, reference: Tensor) -> float:
    return ((result - reference).double().norm() / reference.double().norm()).item()


def choices(plan: Plan) -> dict[str, Any]:
    sampling = ("batched_guidance", "workspace_bytes", "streamed", "offload_skips", "weight_storage", "chunk_size")
    frames = ("encode_tile_size", "decode_chunk_size", "tile_size", "maps_bytes")
    return {name: value for name, value in plan_as_dict(plan).items() if name in (*sampling, *frames)}


def traced_row(plan: Plan, cap_gib: float) -> Row:
    rows = tuple(
        StageRow(stage=it.stage.value, predicted_bytes=it.peak_bytes, with_margin_bytes=needed_bytes(it, plan.device))
        for it in plan.predictions
    )
    return Row(size=str(plan.request.size), cap_gib=cap_gib, settings=choices(plan), stages=rows)


def table_of(
    size: VideoSize,
    caps_gib: Sequence[float],
    facts: DeviceFacts,
    run: Callable[[Plan, float], Row],
    lines: Callable[[Row], str],
) -> list[Row]:
    """Return a row per cap, made by `run` from its plan or stating the refusal; print each with `lines`."""
    rows: list[Row] = []
    for cap_gib in caps_gib:
        request = Request(architecture=ARCHITECTURE, size=size, precision=PRECISION)
        try:
            row = run(make_plan(request, Budget(free_bytes=int(cap_gib * GIB)), facts), cap_gib)
        except (I2VError, torch.OutOfMemoryError) as error:
            row = Row(size=str(size), cap_gib=cap_gib, settings=None, note=f"{type(error).__name__}: {error}")
        rows.append(row)
        print(lines(row), flush=True)
    return rows


def trace(sizes: Sequence[VideoSize], caps_gib: Sequence[float], out: Path) -> None:
    """Print and write the plans for an imaginary card that supports fp16."""
    print("No CUDA device: everything below is traced, nothing is measured.\n")
    print(heading(TRACED_HEADS))
    card = DeviceFacts(device="cuda", name="a card that is not there", precisions=(DTYPE,))
    rows = [row for size in sizes for row in table_of(size, caps_gib, card, traced_row, traced_lines)]
    about = {"measured": False, "device": None, "model": ARCHITECTURE.family, "precision": PRECISION}
    write_json(out / "memory-caps-traced.json", rows, [], about)


def measure(sizes: Sequence[VideoSize], caps_gib: Sequence[float], steps: int, out: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    facts, total_bytes = device_facts(device), torch.cuda.get_device_properties(device).total_memory
    caps_gib = [cap_gib for cap_gib in caps_gib if cap_gib * GIB <= total_bytes]
    model = random_model(device)
    rows: list[Row] = []
    stocks: list[dict[str, Any]] = []
    print(f"{facts.name}, {PRECISION}, {steps} steps\n\n{heading(MEASURED_HEADS)}", flush=True)
    for size in sizes:
        torch.cuda.set_per_process_memory_fraction(1.0)
        stock = run_stock(model, size, steps, device)
        if stock:
            stocks.append({"size": stock.size, "peak_bytes": stock.peak_bytes, "step_seconds": stock.step_seconds})

        def run(plan: Plan, cap_gib: float, stock: Stock | None = stock) -> Row:
            empty_caches()
            torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / total_bytes)
            return measured_row(model, plan, cap_gib, stock, steps)

        rows += table_of(size, caps_gib, facts, run, measured_lines)
    about = {"measured": True, "device": facts.name, "model": ARCHITECTURE.family, "precision": PRECISION}
    name = "-".join(facts.name.lower().split())
    write_json(out / f"memory-caps-{name}.json", rows, stocks, {**about, "steps": steps, "seed": SEED, "cfg": CFG})


def size_of(text: str) -> VideoSize:
    """Parse a size such as 512x512x16."""
    width, height, frames = (int(part) for part in text.split("x"))
    return VideoSize(width_pixels=width, height_pixels=height, frames=frames)


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the pipeline under caps on device memory.")
    parser.add_argument("--size", action="append", type=size_of, metavar="WxHxF", help="pixels and frames")
    parser.add_argument("--cap", action="append", type=float, metavar="GIB", help="a cap on device memory")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps, of which the first warms up (default: 4)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON's folder")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step warms up")
    sizes, caps_gib = options.size or FAMILY.facts.table_sizes, options.cap or CAPS_GIB
    if torch.cuda.is_available():
        measure(sizes, caps_gib, options.steps, options.out)
    else:
        trace(sizes, caps_gib, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
