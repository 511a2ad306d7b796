"""The picture of a run's memory shows the right things in the right places, whatever the run was."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from i2v_core.errors import MissingPackageError
from i2v_core.memory.timeline import Timeline
from i2v_core.memory_picture import draw_memory
from i2v_core.run_report import StageFigures, table_text
from i2v_core.units import GIB, MIB

SAMPLE = StageFigures(
    stage="sample",
    predicted_peak_bytes=60 * MIB,
    uncertainty_bytes=2 * MIB,
    measured_peak_bytes=61 * MIB,
    usable_bytes=80 * MIB,
    seconds=2.0,
    retries=0,
    timeline=Timeline(interval_seconds=0.01, peaks_bytes=(20 * MIB, 61 * MIB) * 100),
)
STAGES = (
    replace(SAMPLE, stage="encode", seconds=0.1, timeline=Timeline(peaks_bytes=(5 * MIB,) * 100)),
    SAMPLE,
    replace(SAMPLE, stage="decode", seconds=0.5, timeline=Timeline(interval_seconds=0.1, peaks_bytes=(MIB,) * 5)),
)
LIMIT_RED, RAN_OUT_ORANGE = (0xFF, 0x6B, 0x62), (0xFF, 0xB4, 0x5C)


def pixels_of(picture_HW3: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """Return row and column of every pixel of exactly this colour."""
    return np.argwhere((picture_HW3 == colour).all(axis=-1))


def long_lines(picture_HW3: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> int:
    """Count the rows in which this colour spans most of the picture."""
    rows, counts = np.unique(pixels_of(picture_HW3, colour)[:, 0], return_counts=True)
    return int((counts[rows > 0] > 0.8 * picture_HW3.shape[1]).sum())


def test_all_stages_stand_under_one_limit() -> None:
    picture_HW3 = draw_memory(STAGES, "a run")
    height, width, channels = picture_HW3.shape
    assert (width, channels) == (1280, 3)
    assert 1000 < height < 1300
    assert long_lines(picture_HW3, LIMIT_RED) >= 2
    assert len(pixels_of(picture_HW3, RAN_OUT_ORANGE)) == 0


def test_a_limit_far_above_is_said_and_not_drawn() -> None:
    far = [replace(stage, usable_bytes=64 * GIB) for stage in STAGES]
    picture_HW3 = draw_memory(far, "a run")
    assert long_lines(picture_HW3, LIMIT_RED) == 0
    assert len(pixels_of(picture_HW3, LIMIT_RED)) > 100


def test_where_memory_ran_out_is_marked() -> None:
    timeline = replace(SAMPLE.timeline, restarts_seconds=(0.7,))
    picture_HW3 = draw_memory([replace(SAMPLE, retries=1, timeline=timeline)], "a run")
    assert len(pixels_of(picture_HW3, RAN_OUT_ORANGE)) > 100


def test_more_memory_fills_more_of_the_picture() -> None:
    lower = replace(SAMPLE, timeline=replace(SAMPLE.timeline, peaks_bytes=(20 * MIB,) * 200))
    full = replace(SAMPLE, timeline=replace(SAMPLE.timeline, peaks_bytes=(60 * MIB,) * 200))

    def bluish(stage: StageFigures) -> int:
        picture = draw_memory([stage], "a run").astype(int)
        return int((picture[..., 2] > picture[..., 0] + 30).sum())

    assert bluish(full) > 2 * bluish(lower)


@pytest.mark.parametrize(
    "stage",
    [
        replace(SAMPLE, seconds=0.0, timeline=Timeline()),
        replace(SAMPLE, seconds=40_000.0, stage="refine", retries=12),
        replace(SAMPLE, predicted_peak_bytes=0, uncertainty_bytes=0, measured_peak_bytes=0, usable_bytes=1),
        replace(SAMPLE, measured_peak_bytes=100 * GIB, usable_bytes=GIB),
    ],
    ids=["nothing recorded", "another stage, for hours", "no memory", "above the limit"],
)
def test_odd_runs_are_drawn(stage: StageFigures) -> None:
    assert draw_memory([stage], "a run").std() > 10


def test_the_table_is_in_line_and_whole() -> None:
    lines = table_text(STAGES).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["stage", "predicted", "measured", "seconds", "retries"]
    assert lines[2].split("  ")[0] == "sample"
    assert "60.0 MiB ± 2.0 MiB" in lines[2]
    assert "61.0 MiB" in lines[2]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(MissingPackageError, match="pip install matplotlib"):
        draw_memory(STAGES, "a run")


def test_nothing_of_matplotlibs_shared_state_is_used() -> None:
    """Allow others in the same process to draw with pyplot, in this thread and with their own settings."""
    pictures: list[np.ndarray[Any, Any]] = []
    threads = [threading.Thread(target=lambda: pictures.append(draw_memory(STAGES, "a run"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert "matplotlib.pyplot" not in sys.modules
