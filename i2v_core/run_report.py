"""What the stages of a run were predicted to take and took: passed on from node to node, as a table, as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .errors import BadInputError
from .files import file_errors, whole_file
from .memory.timeline import Timeline
from .planning.plan import Plan
from .planning.report import plan_as_dict
from .units import format_gib

_VERSION = 1
_TITLES = ("stage", "predicted", "measured", "seconds", "retries")
_NUMBERS = re.compile(r"\[\s*([-\d.e]+(?:,\s*[-\d.e]+)*)\s*\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """`stages` are `StageReport.as_dict` of each stage that is known, in order. `plan` is the one that the run began
    with; None where the video was not decoded here.
    """

    plan: Plan | None
    stages: tuple[Mapping[str, Any], ...]

    def figures(self) -> tuple[StageFigures, ...]:
        """Raises `BadInputError` where no stage is known, or one's report is not whole."""
        if not self.stages:
            raise BadInputError(
                "the report knows of no stage: finished images were saved",
                "take the report of a node that decodes a latent",
            )
        return tuple(StageFigures.from_dict(stage) for stage in self.stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFigures:
    """One stage as it is shown. `usable_bytes` is what its plan may use, `retries` how often it ran out of memory."""

    stage: str
    predicted_peak_bytes: int
    uncertainty_bytes: int
    measured_peak_bytes: int
    usable_bytes: int
    seconds: float
    retries: int
    timeline: Timeline

    @classmethod
    def from_dict(cls, content: object) -> StageFigures:
        """What `StageReport.as_dict` gave; raises `BadInputError` for anything else."""
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
        """As texts, in the order of the table's titles."""
        return (
            self.stage,
            f"{format_gib(self.predicted_peak_bytes)} ± {format_gib(self.uncertainty_bytes)}",
            format_gib(self.measured_peak_bytes),
            f"{self.seconds:.1f}",
            str(self.retries),
        )


def table(stages: Sequence[StageFigures]) -> tuple[tuple[str, ...], ...]:
    """Rows of texts, the titles first."""
    return (_TITLES, *(stage.cells() for stage in stages))


def table_text(stages: Sequence[StageFigures]) -> str:
    """The table with its columns in line."""
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
    """`NAME.mp4.json` beside `NAME.mp4`; likewise of a folder of pictures."""
    return video.with_name(f"{video.name}.json")


def write_run_report(video: Path, report: RunReport) -> Path:
    """Write what is known of a video's run beside the file, or the folder of pictures; the report's path.

    Raises:
        FileError: it cannot be written; then there is none.
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
    with whole_file(path) as temporary, file_errors(path):
        temporary.write_text(text + "\n", "utf-8")
    return path


def _on_one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers[1].split())}]"
