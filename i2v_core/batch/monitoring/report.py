"""What a list of jobs has come to, in words: a row for each, then what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...units import format_gib
from ..jobs.job import JobRecord, JobState
from ..jobs.job_file import BadRow

_TITLES = ("job", "picture", "size", "state", "seconds", "predicted", "measured", "video")
_LEFT = {"picture", "state", "video"}


def summary(counts: Mapping[JobState, int], bad: Sequence[BadRow] = ()) -> str:
    """Such as `3 done, 1 failed; 2 rows cannot run`."""
    words = ", ".join(f"{counts[state]} {state.value}" for state in JobState if counts[state]) or "no jobs"
    return f"{words}; {len(bad)} {'row' if len(bad) == 1 else 'rows'} cannot run" if bad else words


def table(records: Sequence[JobRecord], bad: Sequence[BadRow], folder: Path) -> str:
    """Every job with what it was predicted to take and took, its video's place from `folder` on, every problem."""
    rows = [_TITLES, *(_cells(record, folder) for record in records)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(_padded, _TITLES, row, widths)).rstrip() for row in rows]
    problems = [f"job {it.id}: {it.problem}" for it in records if it.problem and it.state is not JobState.DONE]
    return "\n".join([*lines, *problems, *map(str, bad)])


def seconds_of(record: JobRecord) -> float | None:
    """What its stages took, or else the time from its start to its end; None where it has not run."""
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
        _amount(record.predicted_bytes),
        _amount(record.measured_bytes),
        _place(record, folder),
    )


def _amount(size_bytes: int | None) -> str:
    return "" if size_bytes is None else format_gib(size_bytes)


def _place(record: JobRecord, folder: Path) -> str:
    output = record.output
    if output is None or record.state is not JobState.DONE:
        return ""
    return output.relative_to(folder).as_posix() if output.is_relative_to(folder) else str(output)


def _padded(title: str, cell: str, width: int) -> str:
    return cell.ljust(width) if title in _LEFT else cell.rjust(width)
