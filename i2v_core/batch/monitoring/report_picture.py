"""Picture of a batch: what each device did when, and the metrics.

matplotlib is imported at first use, and without its global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import MissingPackageError
from ...files import atomic_file, file_errors
from ...units import MIB
from .events import Span
from .leak_detector import MemoryTrend
from .metrics import BatchMetrics

_COLOURS = {"encode": "#4fb3c8", "sample": "#8f8bf5", "decode": "#62c38a", "write": "#c48fd6"}
_BACKGROUND, _PANEL, _LINES, _TEXT, _WAITED = "#1b1d23", "#23262e", "#3b404c", "#f1f3f6", "#4a4f5c"
_LEAK = "#e0806f"
_WIDTH_INCHES, _ROW_INCHES, _FRAME_INCHES, _TREND_INCHES, _DOTS_PER_INCH = 10.0, 0.32, 1.4, 1.8, 120
_MINUTE_SECONDS = 60.0


def draw_batch(spans: Sequence[Span], figures: BatchMetrics, path: Path) -> None:
    """Draw a PNG: a row for each stage of each device, a bar for each job; waits for memory are grey.

    A suspected leak has its curve below.

    Args:
        spans: at least one.

    Raises:
        MissingPackageError: matplotlib is not installed.
        FileError: the picture cannot be written.
    """
    try:
        from matplotlib import figure as mpl_figure
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingPackageError("matplotlib is not installed", "install it with `pip install matplotlib`") from error
    rows = [(device, stage) for device in sorted({it.device for it in spans}) for stage in _COLOURS]
    leaks = [trend for trend in figures.held if trend.suspected]
    heights_inches = [_FRAME_INCHES + _ROW_INCHES * len(rows), *[_TREND_INCHES] * len(leaks)]
    figure: Any = mpl_figure.Figure(
        figsize=(_WIDTH_INCHES, sum(heights_inches)), facecolor=_BACKGROUND, layout="constrained"
    )
    panels = figure.subplots(len(heights_inches), squeeze=False, height_ratios=heights_inches)[:, 0]
    _draw_rows(panels[0], rows, spans)
    for panel, trend in zip(panels[1:], leaks, strict=True):
        _draw_trend(panel, trend)
    figure.suptitle(_title(figures), color=_TEXT, fontsize=12)
    canvas: Any = FigureCanvasAgg(figure)
    with atomic_file(path) as temporary, file_errors(path):
        canvas.print_figure(temporary, format="png", dpi=_DOTS_PER_INCH)


def _draw_rows(axes: Any, rows: Sequence[tuple[str, str]], spans: Sequence[Span]) -> None:
    first = min(span.asked for span in spans)
    unit, name = (_MINUTE_SECONDS, "minutes") if max(it.ended for it in spans) - first > 300 else (1.0, "seconds")
    for row, (device, stage) in enumerate(rows):
        here = [span for span in spans if (span.device, span.stage) == (device, stage)]
        waits = [((span.asked - first) / unit, span.waited_seconds / unit) for span in here]
        bars = [((span.begun - first) / unit, span.seconds / unit) for span in here]
        axes.broken_barh(waits, (row - 0.15, 0.3), color=_WAITED)
        axes.broken_barh(bars, (row - 0.35, 0.7), color=_COLOURS[stage], edgecolor=_PANEL, linewidth=0.5)
    axes.set_yticks(range(len(rows)), [f"{device}  {stage}" for device, stage in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel(name, color=_TEXT)
    _colour(axes)
    axes.grid(axis="x", color=_LINES, linewidth=0.5)


def _draw_trend(axes: Any, trend: MemoryTrend) -> None:
    """Draw a point for each baseline."""
    axes.plot([it.job for it in trend.baselines], [it.held_bytes / MIB for it in trend.baselines], ".-", color=_LEAK)
    axes.set_xlabel(f"memory of {trend.place} held between jobs, in MiB, by job: suspected leak", color=_TEXT)
    _colour(axes)
    axes.grid(color=_LINES, linewidth=0.5)


def _colour(axes: Any) -> None:
    axes.set_facecolor(_PANEL)
    axes.tick_params(colors=_TEXT)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(_LINES)


def _title(figures: BatchMetrics) -> str:
    parts = [f"{figures.done} done", f"{figures.jobs_an_hour:.0f} an hour"]
    parts += [f"{figures.failed} failed"] if figures.failed else []
    parts += [f"{figures.retries} tried again"] if figures.retries else []
    parts.append(f"{figures.waiting_share:.0%} of the time waiting for room")
    if figures.utilisation is not None and figures.occupancy is not None:
        parts.append(f"GPU {figures.utilisation:.0%} busy, memory {figures.occupancy:.0%} at most")
    return " · ".join(parts)
