"""Console output of the scripts: a status line that is rewritten while a step runs, sizes, and a table."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

GIB = 1 << 30
MIB = 1 << 20
QUIET_SECONDS = 15.0
"""Interval between status lines if the output is not a terminal."""


class Step:
    """One step of a script as one line: `label`, status, and the seconds it has taken.

    In a terminal the line is rewritten in place; elsewhere it is printed now and then, and once when the step is done.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._started = time.monotonic()
        self._shown = self._started
        self._terminal = sys.stdout.isatty()
        self._width = 0
        if self._terminal:
            self.show("")

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def show(self, text: str) -> None:
        """Show `text` as the current status."""
        if self._terminal:
            self._write(text, end="")
        elif time.monotonic() - self._shown >= QUIET_SECONDS:
            self._shown = time.monotonic()
            self._write(text, end="\n")

    def done(self, text: str = "done") -> None:
        """End the step and keep its line."""
        self._write(text, end="\n")

    def _write(self, text: str, end: str) -> None:
        line = f"{self._label:<12} {self.seconds:5.0f} s  {text}"
        if self._terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
            blank = " " * (self._width - len(line))
            self._width = len(line)
            print(f"\r{line}{blank}", end=end, flush=True)
        else:
            print(line.rstrip(), end=end, flush=True)


def bar(done: float, total: float, width: int = 30) -> str:
    """Draw `done` of `total` as a bar of `width` characters. ASCII only, since not every console can print more."""
    filled = round(width * min(done / total, 1.0)) if total else 0
    return f"[{'#' * filled}{'-' * (width - filled)}]"


def size(size_bytes: int | None) -> str:
    """Format a size in GiB, or in MiB below one GiB; `-` if it is not known."""
    if size_bytes is None:
        return "-"
    return f"{size_bytes / GIB:.2f} GiB" if size_bytes >= GIB else f"{size_bytes / MIB:.1f} MiB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table with columns as wide as their content; the first is aligned left, the others right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])
