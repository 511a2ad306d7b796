"""Measures jobs per hour: a queue whose stages overlap, against the same queue one job after another.

    python benchmarks/batch.py [--jobs N] [--size WxH] [--frames N] [--steps N] [--model FOLDER] [--rounds N]
                               [--together 2,3 --vram SIZE]

--together adds runs that sample that many jobs in one batch, as long as they fit and a batched step is not slower than
the jobs' steps one after another; --vram limits the memory, which makes weights stream. The modes run the package's
engine on this machine's device in turns, each with a new queue. Prints a table and writes
docs/benchmarks/batch-DEVICE.json, or together-DEVICE.json. The limit is the slowest stage: with perfect overlap a job
ends each time that stage does. On a CPU each stage has one thread, so that overlapping stages have a core each.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from i2v_core.batch.devices.device import local_devices  # noqa: E402
from i2v_core.batch.engines.local import LocalEngine  # noqa: E402
from i2v_core.batch.engines.settings import EngineSettings  # noqa: E402
from i2v_core.batch.jobs.job import JobSpec, JobState  # noqa: E402
from i2v_core.batch.jobs.store import JobStore  # noqa: E402
from i2v_core.batch.monitoring.events import Span  # noqa: E402
from i2v_core.families import I2VModel, VideoSize, load_model  # noqa: E402
from i2v_core.memory.calibration import CalibrationStore  # noqa: E402
from i2v_core.memory.device import device_facts  # noqa: E402
from i2v_core.units import parse_bytes  # noqa: E402

DEMO = ROOT / "assets" / "demo_model"
MODES = {"one after another": (1, 1), "overlapped": (4, 1)}
"""Maximum of jobs in flight, and of jobs sampled in one batch."""


def make_jobs(folder: Path, options: argparse.Namespace) -> list[JobSpec]:
    width, height = map(int, options.size.split("x"))
    picture = folder / "picture.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    return [
        JobSpec(
            model=options.model,
            image=picture,
            prompt="a red circle moves left",
            size=VideoSize(width_pixels=width, height_pixels=height, frames=options.frames),
            steps=options.steps,
            cfg=2.0,
            fps=8.0,
            seed=seed,
        )
        for seed in range(options.jobs)
    ]


def run(
    folder: Path, jobs: list[JobSpec], model: I2VModel, mode: tuple[int, int], limit_bytes: int | None
) -> tuple[float, float, list[Span]]:
    """Run a batch; return its wall-clock seconds, its processor seconds, and the spans of its stages."""
    max_in_flight, clips = mode
    store = JobStore(folder / "jobs.queue")
    store.add(jobs)
    spans: list[Span] = []
    devices = local_devices(limit_bytes, 0, CalibrationStore(folder / "calibration.json"))[:1]
    settings = EngineSettings(output=folder / "out", max_in_flight=max_in_flight, clips_at_once=clips)
    engine = LocalEngine(store, devices, settings, load=lambda _: model, on_span=spans.append)
    began, worked = time.perf_counter(), time.process_time()
    engine.run()
    seconds, processor_seconds = time.perf_counter() - began, time.process_time() - worked
    assert store.counts()[JobState.DONE] == len(jobs), store.counts()
    store.close()
    return seconds, processor_seconds, spans


def figures(took: list[tuple[float, float]], spans: list[Span], jobs: int) -> dict[str, Any]:
    seconds, processor_seconds = zip(*took, strict=True)
    stages: defaultdict[str, list[float]] = defaultdict(list)
    for span in spans:
        stages[span.stage].append(span.seconds)
    return {
        "jobs_an_hour": round(3600 * jobs / statistics.median(seconds), 1),
        "processor_seconds_a_job": round(statistics.median(processor_seconds) / jobs, 3),
        "batch_seconds": [round(it, 3) for it in seconds],
        "stage_seconds": {stage: round(statistics.median(it), 4) for stage, it in stages.items()},
        "waited_for_room_seconds": round(sum(span.waited_seconds for span in spans) / len(seconds), 3),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model = load_model(options.model)
    at_once = [int(clips) for clips in options.together.split(",") if clips]
    modes = {**MODES, **{f"{clips} together": (MODES["overlapped"][0], clips) for clips in at_once}}
    limit_bytes = None if options.vram is None else parse_bytes(options.vram)
    took: dict[str, list[tuple[float, float]]] = {mode: [] for mode in modes}
    spans: dict[str, list[Span]] = {mode: [] for mode in modes}
    for number in range(options.rounds + 1):  # the first warms everything up
        for mode, numbers in modes.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds, processor_seconds, stages = run(
                    Path(folder), make_jobs(Path(folder), options), model, numbers, limit_bytes
                )
            if number:
                took[mode].append((seconds, processor_seconds))
                spans[mode] += stages
            print(f"round {number} of {options.rounds}, {mode}: {seconds:.1f} s", flush=True)
    rows = {mode: figures(took[mode], spans[mode], options.jobs) for mode in modes}
    alone = rows["one after another"]["stage_seconds"]
    slowest = max(alone, key=lambda stage: alone[stage])
    return {
        "ways": rows,
        "times_faster": round(rows["overlapped"]["jobs_an_hour"] / rows["one after another"]["jobs_an_hour"], 3),
        "slowest_stage": slowest,
        "limit_jobs_an_hour": round(3600 / alone[slowest], 1),
    }


def print_table(answer: dict[str, Any]) -> None:
    rows = answer["ways"]
    stages = list(rows["one after another"]["stage_seconds"])
    print(f"\n{'':<20}{'jobs an hour':>14}{'processor, s':>14}" + "".join(f"{f'{stage}, s':>12}" for stage in stages))
    for mode, row in rows.items():
        columns = "".join(f"{row['stage_seconds'][it]:>12.3f}" for it in stages)
        print(f"{mode:<20}{row['jobs_an_hour']:>14}{row['processor_seconds_a_job']:>14}{columns}")
    print(f"{'limit':<20}{answer['limit_jobs_an_hour']:>14}  by {answer['slowest_stage']} alone")
    print(f"overlapped makes {answer['times_faster']} times as many jobs an hour")


def main() -> None:
    parser = argparse.ArgumentParser(description="Jobs an hour, overlapped and one after another.")
    parser.add_argument("--jobs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--together", default="", metavar="N,…")
    parser.add_argument("--vram", metavar="SIZE")
    parser.add_argument("--model", type=Path, default=DEMO)
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = device_facts(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    answer = measure(options)
    print_table(answer)
    options_used = {name: getattr(options, name) for name in ("jobs", "rounds", "size", "frames", "steps", "vram")}
    content = {
        "device": device.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": options.model.name,
        **options_used,
        **answer,
    }
    kind = "together" if options.together else "batch"
    output = ROOT / "docs" / "benchmarks" / f"{kind}-{device.torch_device.type}.json"
    output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(f"written to {output.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
