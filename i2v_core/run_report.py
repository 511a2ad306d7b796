"""Report of a run: predicted and measured memory of its stages, as a table and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .errors import BadInputError
from .files import atomic_file, file_errors
from .memory.timeline import Timeline
from .planning.plan import Plan
from .planning.report import plan_as_dict
from .units import format_gib

_VERSION = 1
_TITLES = ("stage", "predicted", "measured", "seconds", "retries")
_NUMBERS = re.compile(r"\[\s*([-\d.e]+(?:,\s*[-\d.e]+)*)\s*\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Report of a run, which nodes pass on."""

    plan: Plan | None
    """The plan that the run started with; None if the video was not decoded here."""

    stages: tuple[Mapping[str, Any], ...]
    """`StageReport.as_dict` of each known stage, in order."""

    def figures(self) -> tuple[StageFigures, ...]:
        """Return the figures of all stages. Raises `BadInputError` if there is none, or a report is incomplete."""
        if not self.stages:
            raise BadInputError(
                "the report knows of no stage: finished images were saved",
                "take the report of a node that decodes a latent",
            )
        return tuple(StageFigures.from_dict(stage) for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFigures:
    """Figures of one stage, for display."""

    stage: str
    predicted_peak_bytes: int
    uncertainty_bytes: int
    measured_peak_bytes: int

    usable_bytes: int
    """Bytes that the plan may use."""

    seconds: float

    retries: int
    """Number of times that the stage ran out of memory and started again."""

    timeline: Timeline

    @classmethod
    def from_dict(cls, content: object) -> StageFigures:
        """Return the figures of a `StageReport.as_dict`. Raises `BadInputError` for any other content."""
        try:
            fields = cast("Mapping[str, Any]", content)
            return cls(
                stage=str(fields["stage"]),
                predicted_peak_bytes=int(fields["predicted_peak_bytes"]),
                uncertainty_bytes=int(fields["uncertainty_bytes"]),
                measured_peak_bytes=int(fields["measured_peak_bytes"]),
                usable_bytes=int(fields["usable_bytes"]),
                seconds=float(fields["seconds"]),
                retries=len(fields["retries"]),
                timeline=Timeline.from_dict(fields["timeline"]),
            )
        except (TypeError, KeyError, ValueError, OverflowError, IndexError) as error:
            raise BadInputError(
                f"the report of a stage cannot be read ({error!r})", "run the stages again with this version"
            ) from error

    def cells(self) -> tuple[str, ...]:
        """Return the figures as text, in the order of the table's titles."""
        return (
            self.stage,
            f"{format_gib(self.predicted_peak_bytes)} ± {format_gib(self.uncertainty_bytes)}",
            format_gib(self.measured_peak_bytes),
            f"{self.seconds:.1f}",
            str(self.retries),
        )


def table(stages: Sequence[StageFigures]) -> tuple[tuple[str, ...], ...]:
    """Return rows of text, titles first."""
    return (_TITLES, *(stage.cells() for stage in stages))


def table_text(stages: Sequence[StageFigures]) -> str:
    """Return the table as text with aligned columns."""
    rows = table(stages)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
    return "\n".join(lines)


def report_path(video: Path) -> Path:
    """Return the report's path: `NAME.mp4.json` for `NAME.mp4`, likewise for a folder of pictures."""
    return video.with_name(f"{video.name}.json")


def write_run_report(video: Path, report: RunReport) -> Path:
    """Write a run's report beside its video, or folder of pictures; returns the report's path.

    Raises:
        FileError: the report cannot be written; then there is none.
    """
    path = report_path(video)
    content = {
        "version": _VERSION,
        "video": video.name,
        "plan": plan_as_dict(report.plan) if report.plan else None,
        "stages": list(report.stages),
        "seconds": sum(float(stage["seconds"]) for stage in report.stages),
    }
    text = _NUMBERS.sub(_on_one_line, json.dumps(content, indent=1, ensure_ascii=False))
    with atomic_file(path) as temporary, file_errors(path):
        temporary.write_text(text + "\n", "utf-8")
    return path


def _on_one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers[1].split())}]"
