"""Command line: plans and memory tables of the bundled architectures, for a card of any size, and batches.

Exit codes: 0 it fits, 2 bad arguments, 3 refused. Those of `batch` are in `batch/command.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from .batch.cli.arguments import add_batch_command
from .errors import I2VError
from .families import VideoSize, bundled_architecture, bundled_models, with_weights
from .memory.device import DeviceFacts
from .placement.precision import AUTO, PRECISIONS, precision_name
from .planning.memory_table import memory_table
from .planning.planner import make_plan
from .planning.report import plan_as_dict, report
from .planning.request import Budget, Request
from .planning.suggestions import NothingFitsError
from .planning.trace import loaded_bytes
from .units import format_gib, parse_bytes

FITS, BAD_ARGUMENTS, REFUSED = 0, 2, 3


def main(arguments: Sequence[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except I2VError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return BAD_ARGUMENTS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m i2v_core", description="Predict memory and plan videos without weights; run batches."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    plan = commands.add_parser("plan", help="plan one video for a card of a given size")
    plan.add_argument("--model", choices=bundled_models(), default="i2vgen-xl")
    plan.add_argument("--width", type=int, required=True, help="width in pixels")
    plan.add_argument("--height", type=int, required=True, help="height in pixels")
    plan.add_argument("--frames", type=int, required=True, help="length in frames")
    plan.add_argument("--vram", required=True, metavar="SIZE", help="device memory that may be used, such as 8GiB")
    plan.add_argument(
        "--ram", metavar="SIZE", help="host memory that may be used, the model's weights included; default: no limit"
    )
    plan.add_argument(
        "--weights",
        metavar="FILE|FORMAT",
        help="Wan only: plan for denoiser weights from a GGUF or fp8 file, or in a format such as q4_k or fp8",
    )
    plan.add_argument("--precision", choices=(AUTO, *PRECISIONS), default="fp16")
    plan.add_argument("--no-guidance", action="store_true", help="one denoiser pass per step")
    plan.add_argument(
        "--allow-approximate",
        action="store_true",
        help="if no exact plan fits, allow 8-bit weights or context windows over the frames, which change the result",
    )
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(run=_plan)

    table = commands.add_parser("memory-table", help="peak memory at some sizes: the plain run, chunked, and streamed")
    table.add_argument("--model", choices=bundled_models(), default="i2vgen-xl")
    table.add_argument("--json", action="store_true")
    table.set_defaults(run=_memory_table)

    add_batch_command(commands)
    return parser


def _plan(options: argparse.Namespace) -> int:
    architecture = bundled_architecture(options.model)
    request = Request(
        architecture=with_weights(architecture, options.weights) if options.weights else architecture,
        size=VideoSize(width_pixels=options.width, height_pixels=options.height, frames=options.frames),
        guidance=not options.no_guidance,
        precision=options.precision,
        allow_approximate=options.allow_approximate,
    )
    vram_bytes = parse_bytes(options.vram)
    card = DeviceFacts(
        device="cuda", name=f"a card with {format_gib(vram_bytes)}", precisions=(torch.float16, torch.float32)
    )
    host_free_bytes = None
    if options.ram is not None:
        host_free_bytes = max(0, parse_bytes(options.ram) - loaded_bytes(request.architecture, torch.float16))
    budget = Budget(free_bytes=vram_bytes, limit_bytes=vram_bytes, host_free_bytes=host_free_bytes)
    try:
        plan = make_plan(request, budget, card)
    except NothingFitsError as refusal:
        least = refusal.least
        answer = {
            "fits": False,
            "plan": None,
            "stages": [],
            "peak_bytes": least.peak_bytes,
            "binding_stage": least.stage.value,
            "reasons": [refusal.problem],
            "nearest": refusal.suggestions.as_dict(),
        }
        _print(options, answer, str(refusal))
        return REFUSED
    choices = plan_as_dict(plan)
    summary = {key: choices.pop(key) for key in ("stages", "peak_bytes", "binding_stage", "reasons")}
    _print(options, {"fits": True, "plan": choices, **summary, "nearest": None}, report(plan))
    return FITS


def _memory_table(options: argparse.Namespace) -> int:
    rows = memory_table(bundled_architecture(options.model), torch.float16)
    columns = ("stock", "resident", "streamed", "decode")
    lines = [f"{'video':<16}" + "".join(f"{column:>12}" for column in columns)]
    lines += [
        f"{row.size!s:<16}" + "".join(f"{format_gib(getattr(row, f'{column}_bytes')):>12}" for column in columns)
        for row in rows
    ]
    lines.append(f"\nPeaks of weights and live tensors in {precision_name(torch.float16)} with guidance, traced.")
    _print(options, [row.as_dict() for row in rows], "\n".join(lines))
    return FITS


def _print(options: argparse.Namespace, answer: Any, text: str) -> None:
    print(json.dumps(answer, indent=2) if options.json else text)
