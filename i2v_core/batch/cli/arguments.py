"""Arguments of `python -m i2v_core batch`. The engine is imported only when it runs, so other commands start faster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...placement.precision import AUTO, PRECISIONS
from ...sampling.checkpoint import CheckpointWhen
from ...sampling.schedulers import SCHEDULERS
from ..engines.ray_cluster import LOCAL
from ..scheduling.policy import Policy

DEFAULT_QUEUE = "jobs.queue"
_DEFAULT_STEPS = 30


def add_batch_command(commands: Any) -> None:
    """Add `batch` to the subparsers of a command line."""
    batch: argparse.ArgumentParser = commands.add_parser(
        "batch",
        help="make the videos of a list; run it again to continue",
        description="Makes the videos of a list. Run it again to continue after an interruption.",
        epilog="Exit codes: 0 all videos are done, 1 some are not, 2 bad arguments or list, 130 interrupted.",
    )
    batch.add_argument("list", type=Path, help="a .csv with a header, or a .jsonl with one object a line")
    batch.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="model in diffusers layout")
    batch.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    batch.add_argument("--queue", type=Path, metavar="FILE", help=f"queue file; default: {DEFAULT_QUEUE} in DIR")
    batch.add_argument("--vram", metavar="SIZE", help="device memory to use, such as 8GiB; default: what is free")
    batch.add_argument("--reserve", metavar="SIZE", help="device memory to leave free; default: none")
    batch.add_argument("--device", action="append", metavar="NAME", help="such as cuda:1 or cpu; default: all cards")
    batch.add_argument(
        "--rule",
        choices=[policy.value for policy in Policy],
        default=Policy.WEIGHT.value,
        help="order of the jobs; default weight: long jobs with little memory and high priority first",
    )
    batch.add_argument("--one-by-one", action="store_true", help="run one job at a time")
    batch.add_argument(
        "--clips-at-once",
        default=AUTO,
        metavar="N",
        help="most jobs of one shape to sample as a batch; default auto: up to 4, if that is predicted to be faster",
    )
    batch.add_argument("--attempts", type=int, default=3, help="runs of a job before it counts as failed; default 3")
    batch.add_argument("--retry", action="store_true", help="also retry jobs that failed or were cancelled before")
    batch.add_argument("--checkpoint", choices=[it.value for it in CheckpointWhen], default=CheckpointWhen.AUTO.value)
    batch.add_argument("--ray", metavar="ADDRESS", help=f"run on a Ray cluster: its address, auto, or {LOCAL}")
    batch.add_argument(
        "--ray-workers", type=int, default=1, metavar="N", help="workers on a cluster without cards; default 1"
    )
    _add_defaults(batch.add_argument_group("defaults for values that a row leaves out"))
    batch.set_defaults(run=_run)


def _add_defaults(group: Any) -> None:
    group.add_argument("--size", metavar="WxH", help="such as 512x320; default: the model's own")
    group.add_argument("--frames", type=int)
    group.add_argument("--steps", type=int, default=_DEFAULT_STEPS)
    group.add_argument("--cfg", type=float)
    group.add_argument("--fps", type=float, default=8.0)
    group.add_argument("--scheduler", choices=SCHEDULERS, default=SCHEDULERS[0])
    group.add_argument("--precision", choices=(AUTO, *PRECISIONS), default=AUTO)
    group.add_argument("--allow-approximate", action="store_true")
    group.add_argument("--format", default="mp4", help="mp4, webm, gif or png; default mp4")
    group.add_argument("--quality", type=int, default=19)


def _run(options: argparse.Namespace) -> int:
    from .command import run_batch

    return run_batch(options)
