"""Draws a run's device memory over time: measured and predicted use of each stage, and the limit.

matplotlib is imported at first use and used through its objects alone: nothing of it is shared with other packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import MissingPackageError
from .run_report import StageFigures, table
from .stages.status import format_seconds
from .units import GIB, MIB, format_gib

# Annotated as `Any`, since matplotlib leaves the types of its keywords open.
Figure = Axes = Any

_WIDTH_INCHES, _DOTS_PER_INCH = 8.0, 160
_CHART_INCHES, _ROW_INCHES, _TITLE_INCHES, _NAMES_INCHES = 3.7, 0.37, 1.25, 0.6

_BACKGROUND, _PANEL, _LINES = "#1b1d23", "#23262e", "#3b404c"
_TEXT, _MUTED, _LIMIT, _FAILED = "#f1f3f6", "#a9b0bd", "#ff6b62", "#ffb45c"
_STAGE_COLOURS = {"encode": "#4fb3c8", "sample": "#8f8bf5", "decode": "#62c38a"}
_OTHER_COLOUR = "#c48fd6"
_SMALL, _NORMAL, _LARGE = 11.5, 13.0, 17.0
_LEFT = 0.035
_PREDICTED_LINE: dict[str, Any] = {"linewidth": 1.6, "linestyle": (0, (4, 2.5))}
_FAILED_LINE: dict[str, Any] = {"linewidth": 1.6, "linestyle": (0, (1.5, 1.5))}

# Panel widths grow with this power of a stage's seconds, so that 0.1 s is visible beside an hour.
_WIDTH_POWER = 0.35
_LEAST_WIDTH = 0.5
# A limit above this many times the highest value is stated, not drawn: it would flatten everything else.
_FAR_LIMIT = 1.8


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Scale of the memory axis: up to `top_bytes`, in units of `unit_bytes`."""

    top_bytes: float
    unit_bytes: int
    unit: str

    @classmethod
    def of(cls, stages: Sequence[StageFigures]) -> _Scale:
        highest_bytes = max(
            max(it.timeline.peak_bytes, it.measured_peak_bytes, it.predicted_peak_bytes + it.uncertainty_bytes)
            for it in stages
        )
        drawn_limits = [it.usable_bytes for it in stages if it.usable_bytes <= _FAR_LIMIT * highest_bytes]
        top_bytes = 1.22 * max(highest_bytes, *drawn_limits, 1)
        return (
            cls(top_bytes=top_bytes, unit_bytes=GIB, unit="GiB")
            if top_bytes >= 0.5 * GIB
            else cls(top_bytes=top_bytes, unit_bytes=MIB, unit="MiB")
        )

    def of_bytes(self, size_bytes: float) -> float:
        return size_bytes / self.unit_bytes


def draw_memory(stages: Sequence[StageFigures], title: str) -> np.ndarray[Any, Any]:
    """Return the picture as (H, W, 3) bytes.

    Args:
        stages: in the order in which they ran; at least one.
        title: a few words that name the run.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure as figures
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MissingPackageError(
            f"the picture needs the package matplotlib ({error})", "install it with: python -m pip install matplotlib"
        ) from error
    table_inches = _ROW_INCHES * (len(stages) + 1) + 0.15
    height_inches = _TITLE_INCHES + _CHART_INCHES + _NAMES_INCHES + table_inches
    figure = figures.Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DOTS_PER_INCH, facecolor=_BACKGROUND)
    canvas: Any = FigureCanvasAgg(figure)
    top, bottom = 1 - _TITLE_INCHES / height_inches, (table_inches + _NAMES_INCHES) / height_inches
    _draw_titles(figure, stages, title, height_inches)
    _draw_legend(figure, stages, 1 - 1.06 / height_inches)
    _draw_panels(figure, stages, top, bottom)
    _draw_table(figure, stages, table_inches / height_inches)
    canvas.draw()
    pixels_HW4: np.ndarray[Any, Any] = np.array(canvas.buffer_rgba())
    return pixels_HW4[..., :3]


def _draw_titles(figure: Figure, stages: Sequence[StageFigures], title: str, height_inches: float) -> None:
    highest = max(stages, key=lambda it: it.measured_peak_bytes)
    retries = sum(it.retries for it in stages)
    facts = [
        f"peak {format_gib(highest.measured_peak_bytes)} of {format_gib(highest.usable_bytes)} in {highest.stage}",
        _duration(sum(it.seconds for it in stages)),
        *([f"ran out {retries}× and went on"] if retries else []),
    ]
    style: dict[str, Any] = {"va": "center"}
    figure.text(_LEFT, 1 - 0.32 / height_inches, title, color=_TEXT, fontsize=_LARGE, fontweight="bold", **style)
    figure.text(_LEFT, 1 - 0.69 / height_inches, ", ".join(facts), color=_MUTED, fontsize=_NORMAL, **style)


def _draw_legend(figure: Figure, stages: Sequence[StageFigures], height: float) -> None:
    from matplotlib.lines import Line2D

    def key(label: str, **style: Any) -> Any:
        return Line2D([], [], label=label, **style)

    keys = [
        key("used", color=_MUTED, linewidth=7, alpha=0.6, solid_capstyle="butt"),
        key("predicted ±", color=_TEXT, **_PREDICTED_LINE),
        key("limit", color=_LIMIT, linewidth=2.2),
    ]
    if any(it.timeline.restarts_seconds for it in stages):
        keys.append(key("ran out", color=_FAILED, marker="X", **_FAILED_LINE))
    figure.legend(
        handles=keys,
        loc="center left",
        bbox_to_anchor=(_LEFT, height),
        ncols=len(keys),
        frameon=False,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.8,
        columnspacing=1.6,
        labelcolor=_MUTED,
        fontsize=_SMALL,
    )


def _draw_panels(figure: Figure, stages: Sequence[StageFigures], top: float, bottom: float) -> None:
    """Draw a panel for each stage, side by side, each with its own time axis and all with the same memory axis."""
    scale = _Scale.of(stages)
    longest = max(it.seconds for it in stages) or 1.0
    widths = [max((it.seconds / longest) ** _WIDTH_POWER, _LEAST_WIDTH) for it in stages]
    grid = figure.add_gridspec(
        1, len(stages), width_ratios=widths, left=0.105, right=0.975, top=top, bottom=bottom, wspace=0.03
    )
    for index, stage in enumerate(stages):
        axes = figure.add_subplot(grid[0, index])
        _style(axes, scale, first=index == 0)
        _draw_stage(axes, stage, scale)
        is_new = index == 0 or stage.usable_bytes != stages[index - 1].usable_bytes
        _draw_limit(axes, stage, scale, said=is_new)


def _style(axes: Axes, scale: _Scale, *, first: bool) -> None:
    axes.set_facecolor(_PANEL)
    axes.set_ylim(0, scale.of_bytes(scale.top_bytes))
    axes.grid(axis="y", color=_LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=_SMALL, length=0, labelleft=first)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if first:
        axes.set_ylabel(scale.unit, color=_MUTED, fontsize=_NORMAL)


def _draw_stage(axes: Axes, stage: StageFigures, scale: _Scale) -> None:
    colour = _STAGE_COLOURS.get(stage.stage, _OTHER_COLOUR)
    line = stage.timeline
    edges = np.arange(len(line.peaks_bytes) + 1) * line.interval_seconds
    values = np.array([scale.of_bytes(it) for it in line.peaks_bytes])
    end = max(stage.seconds, float(edges[-1]), 1e-6)
    axes.set_xlim(0, end)
    axes.stairs(values, edges, fill=True, color=colour, alpha=0.35)
    axes.stairs(values, edges, color=colour, linewidth=1.8, baseline=None)

    predicted, spread = scale.of_bytes(stage.predicted_peak_bytes), scale.of_bytes(stage.uncertainty_bytes)
    axes.axhspan(predicted - spread, predicted + spread, color=_TEXT, alpha=0.13, linewidth=0)
    axes.axhline(predicted, color=_TEXT, **_PREDICTED_LINE)
    for seconds in line.restarts_seconds:
        axes.axvline(seconds, color=_FAILED, **_FAILED_LINE)
        axes.plot([seconds], [0.03 * scale.of_bytes(scale.top_bytes)], "X", color=_FAILED, markersize=8)

    axes.set_xticks([])
    axes.set_xlabel(f"{stage.stage}\n{_duration(stage.seconds)}", color=colour, fontsize=_NORMAL, fontweight="bold")


def _draw_limit(axes: Axes, stage: StageFigures, scale: _Scale, *, said: bool) -> None:
    """Draw the limit as a line, or as text if it is far above everything else."""
    is_far = stage.usable_bytes > scale.top_bytes
    if not is_far:
        axes.axhline(scale.of_bytes(stage.usable_bytes), color=_LIMIT, linewidth=2.2)
    if said:
        axes.text(
            0.02,
            0.97 if is_far else stage.usable_bytes / scale.top_bytes + 0.015,
            f"limit {format_gib(stage.usable_bytes)}{' ↑' if is_far else ''}",
            transform=axes.transAxes,
            va="top" if is_far else "bottom",
            color=_LIMIT,
            fontsize=_SMALL,
            fontweight="bold",
            zorder=5,
        )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


def _draw_table(figure: Figure, stages: Sequence[StageFigures], height: float) -> None:
    from matplotlib.lines import Line2D

    rows = table(stages)
    edges = (_LEFT, 0.52, 0.70, 0.84, 0.965)  # of the columns: the first's left one, the others' right ones

    def line_height(row: float) -> float:
        return height * (1 - (row + 0.4) / (len(rows) + 0.2))

    figure.add_artist(Line2D([edges[0], edges[-1]], [line_height(0.5)] * 2, color=_LINES, linewidth=1))
    for row, cells in enumerate(rows):
        for column, (cell, x) in enumerate(zip(cells, edges, strict=True)):
            is_name = row > 0 and column == 0
            figure.text(
                x,
                line_height(row),
                cell,
                ha="left" if column == 0 else "right",
                va="center",
                fontsize=_NORMAL,
                color=_MUTED if row == 0 else _STAGE_COLOURS.get(cell, _OTHER_COLOUR) if is_name else _TEXT,
                fontweight="bold" if is_name else "normal",
            )
