"""Calibration: ratios that are recorded, and faults that a store survives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from i2v_core.memory.calibration import UNCALIBRATED, CalibrationStore, StageRatios, calibration_key

KEY = calibration_key("a card", "abc")


def test_ratios_are_kept_by_key_and_stage(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    store = CalibrationStore(path)
    assert store.calibration(KEY) == UNCALIBRATED
    for measured in (95, 104, 101):
        store.record(KEY, "sample", predicted_bytes=100, measured_bytes=measured)
    store.record(calibration_key("another card", "abc"), "sample", predicted_bytes=100, measured_bytes=180)
    found = CalibrationStore(path).calibration(KEY)
    assert found.of("sample") == StageRatios(stage="sample", lowest=0.95, highest=1.04, runs=3)
    assert found.of("decode") is None
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]


def test_old_ratios_are_forgotten(tmp_path: Path) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.record(KEY, "sample", predicted_bytes=100, measured_bytes=150)
    for _ in range(20):
        store.record(KEY, "sample", predicted_bytes=100, measured_bytes=101)
    assert store.calibration(KEY).of("sample") == StageRatios(stage="sample", lowest=1.01, highest=1.01, runs=20)


@pytest.mark.parametrize("measured", [0, 10, 900])
def test_ratios_out_of_range_are_not_recorded(tmp_path: Path, measured: int) -> None:
    store = CalibrationStore(tmp_path / "calibration.json")
    store.record(KEY, "sample", predicted_bytes=100, measured_bytes=measured)
    assert store.calibration(KEY) == UNCALIBRATED


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe\x00",
        b'{"version": 99, "entries": {}}',
        b'{"version": 1}',
        b'{"version": 1, "entries": {"k": {"sample": ["x"]}}}',
        b'{"version": 1, "entries": {"k": {"sample": [1e9]}}}',
        b'{"version": 1, "entries": {"k": 3}}',
    ],
)
def test_a_store_that_cannot_be_read_is_set_aside(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    store = CalibrationStore(path)
    assert store.calibration(KEY) == UNCALIBRATED
    assert (tmp_path / "calibration.broken").read_bytes() == content
    store.record(KEY, "sample", predicted_bytes=100, measured_bytes=101)
    assert json.loads(path.read_text())["entries"][KEY] == {"sample": [1.01]}


def test_a_folder_that_cannot_be_written_is_not_fatal(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    CalibrationStore(blocker / "calibration.json").record(KEY, "sample", predicted_bytes=100, measured_bytes=101)
    assert blocker.read_text() == ""
