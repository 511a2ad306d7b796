"""Rows of `memory_caps.py`, as a Markdown table and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from i2v_core.units import format_gib


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """Predicted and measured peak of one stage. None: not measured."""

    stage: str
    predicted_bytes: int
    with_margin_bytes: int
    measured_bytes: int | None = None

    reserved_bytes: int | None = None
    """Peak that the allocator reserved."""

    error: float | None = None
    """Relative error of the prediction without its margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One video under one cap."""

    size: str
    cap_gib: float

    settings: dict[str, Any] | None
    """The plan's settings; None if the video was refused."""

    stages: tuple[StageRow, ...] = ()
    step_seconds: float | None = None

    ratio_to_stock: float | None = None
    """Time of a step over that of the plain forward without a cap."""

    difference_from_stock: float | None = None
    """Relative RMS of the difference of the final latents."""

    traffic: float | None = None
    """Weights copied in one denoiser pass, over the denoiser's size."""

    note: str = ""
    """The reason of a refusal."""


Columns = tuple[str, ...]

MEASURED_HEADS: Columns = (
    *("video", "cap", "stage", "predicted", "with margin", "measured", "reserved", "error"),
    *("s/step", "× stock", "RMS", "traffic"),
)
TRACED_HEADS: Columns = (
    *("video", "cap", "encode", "sample", "decode", "guidance", "chunks up to", "streamed", "skips", "frames decoded"),
)


def line(cells: Sequence[str]) -> str:
    """Format a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def heading(heads: Columns) -> str:
    return line(heads) + "\n|" + "---|" * len(heads)


def measured_lines(row: Row) -> str:
    """Format a line per stage; the figures of sampling stand in its line alone."""
    if not row.stages:
        return _refused(row, MEASURED_HEADS)
    return "\n".join(line((row.size, f"{row.cap_gib:g}", *_measured(row, stage))) for stage in row.stages)


def _measured(row: Row, stage: StageRow) -> Columns:
    sampling = stage.stage == "sample"
    return (
        stage.stage,
        format_gib(stage.predicted_bytes),
        format_gib(stage.with_margin_bytes),
        _shown(stage.measured_bytes, format_gib),
        _shown(stage.reserved_bytes, format_gib),
        _shown(stage.error, lambda it: f"{it:+.1%}"),
        _shown(row.step_seconds if sampling else None, lambda it: f"{it:.2f}"),
        _shown(row.ratio_to_stock if sampling else None, lambda it: f"{it:.2f}"),
        _shown(row.difference_from_stock if sampling else None, lambda it: f"{it:.1e}"),
        _shown(row.traffic if sampling else None, lambda it: f"{it:.3f}"),
    )


def traced_lines(row: Row) -> str:
    """Format one line: the plan's predicted peaks and settings."""
    settings = row.settings
    if settings is None:
        return _refused(row, TRACED_HEADS)
    return line(
        (
            row.size,
            f"{row.cap_gib:g}",
            *(format_gib(stage.predicted_bytes) for stage in row.stages),
            "one pass" if settings["batched_guidance"] else "two passes",
            _shown(settings["workspace_bytes"], format_gib),
            ", ".join(settings["streamed"]) or "–",
            "in host memory" if settings["offload_skips"] else "on the device",
            f"{settings['decode_chunk_size']}"
            + (f", tiles of {settings['tile_size']}" if settings["tile_size"] else ""),
        )
    )


def _refused(row: Row, heads: Columns) -> str:
    return line((row.size, f"{row.cap_gib:g}", row.note, *[""] * (len(heads) - 3)))


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)


def write_json(file: Path, rows: Sequence[Row], stock: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """Write the results. `about` describes the run and the device; versions and date are added."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    content = {
        **about,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {**versions, "cuda": torch.version.cuda if torch.cuda.is_available() else None},
        "stock": list(stock),
        "rows": [asdict(row) for row in rows],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
