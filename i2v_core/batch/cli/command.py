"""`python -m i2v_core batch`: runs a list of jobs to its end, without a host.

Exit codes: 0 every row is a video, 1 some are not, 2 bad arguments or a list of which nothing can run, 130 interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from ...errors import BadInputError, I2VError
from ...families import VideoSize, family_of, read_architecture
from ...memory.calibration import CalibrationStore
from ...placement.precision import AUTO
from ...sampling.checkpoint import CheckpointWhen, weights_identity
from ...units import parse_bytes
from ..devices.device import LocalDevice, local_devices
from ..engines.engine import BatchEngine
from ..engines.local import LocalEngine
from ..engines.ray_driver import RayEngine
from ..engines.settings import MOST_CLIPS, EngineSettings
from ..jobs.job import JobSpec, JobState
from ..jobs.job_file import JobList, read_job_list
from ..jobs.store import JobStore
from ..scheduling.policy import Policy
from .arguments import DEFAULT_QUEUE
from .console import Console, say

ALL_DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130
_PICTURE = "batch.png"
_POLL_SECONDS = 0.5


def run_batch(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit code. Raises `I2VError` for invalid arguments and lists."""
    found = _read_list(options)
    for row in found.bad:
        say(f"{options.list}, {row}")
    if not found.jobs:
        raise BadInputError(f"no row of {options.list} can run", "fix the rows listed above")
    if options.attempts < 1:
        raise BadInputError(f"--attempts {options.attempts} is not possible", "use 1 or more")
    store = JobStore(options.queue or options.out / DEFAULT_QUEUE)
    console = Console(len(found.jobs), store)
    try:
        ids = store.add(job.spec for job in found.jobs)
        store.set_paused(False)
        if options.retry:
            _retry(store, ids)
        interrupted = _run(options, store, ids, console)
        failed = console.summary(store, ids)
        console.draw(options.out / _PICTURE)
    finally:
        console.close()
        store.close()
    if interrupted:
        return INTERRUPTED
    return SOME_FAILED if failed or found.bad else ALL_DONE


def _read_list(options: argparse.Namespace) -> JobList:
    facts = family_of(read_architecture(options.model)).facts
    width, height = facts.default_size.width_pixels, facts.default_size.height_pixels
    if options.size is not None:
        try:
            width, height = (int(side) for side in options.size.lower().replace("×", "x").split("x"))
        except ValueError:
            raise BadInputError(f"'{options.size}' is not a valid size", "write for example 512x320") from None
    frames = facts.default_size.frames if options.frames is None else options.frames
    size = VideoSize(width_pixels=width, height_pixels=height, frames=frames)
    facts.check(size)
    defaults = JobSpec(
        model=options.model.resolve(),
        model_identity=weights_identity(options.model),
        image=Path(),
        prompt="",
        size=size,
        steps=options.steps,
        cfg=facts.default_cfg if options.cfg is None else options.cfg,
        fps=options.fps,
        scheduler=options.scheduler,
        precision=options.precision,
        allow_approximate=options.allow_approximate,
        format=options.format,
        quality=options.quality,
    )
    return read_job_list(options.list.resolve(), defaults, facts)


def _run(options: argparse.Namespace, store: JobStore, ids: Sequence[int], console: Console) -> bool:
    """Runs the queue to its end; whether it was interrupted."""
    engine = _engine(options, store, console)
    engine.start()
    interrupted = False
    try:
        while True:
            try:
                if engine.join(_POLL_SECONDS):
                    return interrupted
                console.show(engine, ids)
            except KeyboardInterrupt:
                if not interrupted:
                    say("stopping; unfinished jobs keep their checkpoints, run the command again to continue")
                interrupted = True
                engine.stop()
    except BaseException:
        engine.stop()
        with suppress(I2VError):
            engine.join()
        raise


def _engine(options: argparse.Namespace, store: JobStore, console: Console) -> BatchEngine:
    settings = EngineSettings(
        output=options.out.resolve(),
        policy=Policy(options.rule),
        max_in_flight=1 if options.one_by_one else 4,
        clips_at_once=_clips(options.clips_at_once),
        attempts=options.attempts,
        checkpoints=CheckpointWhen(options.checkpoint),
    )
    limit_bytes = None if options.vram is None else parse_bytes(options.vram)
    reserve_bytes = 0 if options.reserve is None else parse_bytes(options.reserve)
    if options.ray is None:
        devices = _devices(options, store, limit_bytes, reserve_bytes)
        return LocalEngine(store, devices, settings, on_event=console.on_event, on_span=console.on_span)
    if options.device is not None:
        raise BadInputError("--device does not go with --ray", "leave it out: every card of the cluster is used")
    return RayEngine(
        store,
        options.ray,
        settings,
        limit_bytes=limit_bytes,
        reserve_bytes=reserve_bytes,
        cpu_workers=max(1, options.ray_workers),
        on_event=console.on_event,
    )


def _clips(text: str) -> int | None:
    """The number, None for `auto`. Raises `BadInputError` for anything else."""
    if text == AUTO:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST_CLIPS:
        raise BadInputError(f"{text} clips at once are not possible", f"use auto, or 1 to {MOST_CLIPS}")
    return int(text)


def _devices(
    options: argparse.Namespace, store: JobStore, limit_bytes: int | None, reserve_bytes: int
) -> list[LocalDevice]:
    calibration = CalibrationStore(store.database.path.parent / "calibration.json")
    if options.device is None:
        return local_devices(limit_bytes, reserve_bytes, calibration)
    return [
        LocalDevice(
            torch_device=_device(name), limit_bytes=limit_bytes, reserve_bytes=reserve_bytes, calibration=calibration
        )
        for name in dict.fromkeys(options.device)
    ]


def _device(name: str) -> torch.device:
    """The device of that name. Raises `BadInputError` where there is none."""
    try:
        device = torch.device("cuda:0" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInputError(f"the device '{name}' cannot be used ({error})", "use cpu, or cuda:0 and so on") from error
    return device


def _retry(store: JobStore, ids: Sequence[int]) -> None:
    for job in store.jobs(JobState.FAILED, JobState.CANCELLED):
        if job.id in ids:
            store.retry(job.id)
