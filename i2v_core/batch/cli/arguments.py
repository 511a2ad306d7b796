"""The arguments of `python -m i2v_core batch`. What runs it is imported when it is run: other commands start faster."""

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
    """Adds `batch` to the subparsers of a command line."""
    batch: argparse.ArgumentParser = commands.add_parser(
        "batch",
        help="make the videos of a list; run it again to go on",
        description="Makes the videos of a list. What is interrupted goes on when it is run again.",
        epilog="Exit codes: 0 every row is a video, 1 some are not, 2 bad arguments or list, 130 interrupted.",
    )
    batch.add_argument("list", type=Path, help="a .csv with a header, or a .jsonl with one object a line")
    batch.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="in diffusers layout")
    batch.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the videos go")
    batch.add_argument("--queue", type=Path, metavar="FILE", help=f"default: {DEFAULT_QUEUE} in DIR")
    batch.add_argument("--vram", metavar="SIZE", help="device memory to use, such as 8GiB; default: what is free")
    batch.add_argument("--reserve", metavar="SIZE", help="device memory to leave to others; default: none")
    batch.add_argument("--device", action="append", metavar="NAME", help="such as cuda:1 or cpu; default: every card")
    batch.add_argument("--rule", choices=[rule.value for rule in Policy], default=Policy.WEIGHT.value)
    batch.add_argument("--one-by-one", action="store_true", help="jobs do not overlap")
    batch.add_argument(
        "--clips-at-once",
        default=AUTO,
        metavar="N",
        help="jobs of one shape that are sampled together at most; default auto: up to 4, where it is predicted to pay",
    )
    batch.add_argument("--attempts", type=int, default=3, help="runs of a job that may fail; default 3")
    batch.add_argument("--retry", action="store_true", help="also try again what has failed or was cancelled before")
    batch.add_argument("--checkpoint", choices=[it.value for it in CheckpointWhen], default=CheckpointWhen.AUTO.value)
    batch.add_argument("--ray", metavar="ADDRESS", help=f"run on a Ray cluster: its address, auto, or {LOCAL}")
    batch.add_argument(
        "--ray-workers", type=int, default=1, metavar="N", help="workers on a cluster that has no cards; default 1"
    )
    _add_defaults(batch.add_argument_group("for rows that do not say it themselves"))
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
