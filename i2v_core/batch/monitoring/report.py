"""Report of a list of jobs as text: a row for each, then the problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...units import format_gib
from ..jobs.job import JobRecord, JobState
from ..jobs.job_file import BadRow

_TITLES = ("job", "picture", "size", "state", "seconds", "predicted", "measured", "video")
_LEFT_ALIGNED = {"picture", "state", "video"}


def summary(counts: Mapping[JobState, int], bad: Sequence[BadRow] = ()) -> str:
    """Numbers of jobs by state, such as `3 done, 1 failed; 2 rows cannot run`."""
    words = ", ".join(f"{counts[state]} {state.value}" for state in JobState if counts[state]) or "no jobs"
    return f"{words}; {len(bad)} {'row' if len(bad) == 1 else 'rows'} cannot run" if bad else words


def table(records: Sequence[JobRecord], bad: Sequence[BadRow], folder: Path) -> str:
    """Table of all jobs with predicted and measured memory, and the problems below; paths are relative to `folder`."""
    rows = [_TITLES, *(_cells(record, folder) for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(_padded, _TITLES, row, widths)).rstrip() for row in rows]
    problems = [f"job {it.id}: {it.problem}" for it in records if it.problem and it.state is not JobState.DONE]
    return "\n".join([*lines, *problems, *map(str, bad)])


def seconds_of(record: JobRecord) -> float | None:
    """Seconds of its stages, or else from its start to its end; None where it has not run."""
    stages = (record.report or {}).get("stages")
    if stages:
        return sum(float(stage["seconds"]) for stage in stages)
    if record.started_at is None or record.finished_at is None:
        return None
    return max(0.0, record.finished_at - record.started_at)


def _cells(record: JobRecord, folder: Path) -> tuple[str, ...]:
    seconds = seconds_of(record)
    return (
        str(record.id),
        record.spec.image.name,
        str(record.spec.size),
        record.state.value,
        "" if seconds is None else f"{seconds:.1f}",
        _gib(record.predicted_bytes),
        _gib(record.measured_bytes),
        _video(record, folder),
    )


def _gib(size_bytes: int | None) -> str:
    return "" if size_bytes is None else format_gib(size_bytes)


def _video(record: JobRecord, folder: Path) -> str:
    output = record.output
    if output is None or record.state is not JobState.DONE:
        return ""
    return output.relative_to(folder).as_posix() if output.is_relative_to(folder) else str(output)


def _padded(title: str, cell: str, width: int) -> str:
    return cell.ljust(width) if title in _LEFT_ALIGNED else cell.rjust(width)
