"""The picture of a batch is a picture, with the colours of what ran."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from i2v_core.batch.monitoring.events import Span
from i2v_core.batch.monitoring.leak_detector import Baseline, memory_trend
from i2v_core.batch.monitoring.metrics import BatchMetrics
from i2v_core.batch.monitoring.report_picture import draw_batch
from i2v_core.errors import FileError, MissingPackageError
from i2v_core.units import GIB, MIB

FIGURES = BatchMetrics(seconds=9.0, done=2, failed=1, retries=1, devices_lost=0, waiting_share=0.2, reserved_share=0.5)
LEAK_COLOUR = (0xE0, 0x80, 0x6F)
SAMPLE_COLOUR, DECODE_COLOUR, WAITED_COLOUR = (0x8F, 0x8B, 0xF5), (0x62, 0xC3, 0x8A), (0x4A, 0x4F, 0x5C)


def span(stage: str, asked: float, begun: float, ended: float, device: str = "cuda:0") -> Span:
    return Span(job=1, device=device, stage=stage, asked=asked, begun=begun, ended=ended)


def count(path: Path, colour: tuple[int, int, int]) -> int:
    pixels_HW3 = np.asarray(Image.open(path).convert("RGB"))
    return int((pixels_HW3 == colour).all(axis=-1).sum())


@pytest.mark.parametrize("seconds", [1.0, 10_000.0])
def test_stages_are_drawn_as_long_as_they_took(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "batch.png"
    sampled = span("sample", 5 * seconds, 5 * seconds, 8 * seconds)
    decoded = span("decode", 6 * seconds, 8 * seconds, 9 * seconds)
    draw_batch([sampled, decoded], FIGURES, path)
    ratio = count(path, SAMPLE_COLOUR) / count(path, DECODE_COLOUR)
    assert ratio == pytest.approx(3, rel=0.15)
    assert count(path, WAITED_COLOUR) > 0


def test_every_device_has_its_lines(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    spans = [span("sample", 0, 0, 3)]
    draw_batch(spans, FIGURES, one)
    draw_batch([*spans, span("sample", 0, 0, 3, device="cuda:1")], FIGURES, two)
    assert Image.open(two).height > Image.open(one).height
    assert count(two, SAMPLE_COLOUR) > 1.5 * count(one, SAMPLE_COLOUR)


def test_a_suspected_leak_has_its_curve(tmp_path: Path) -> None:
    plain, leaking = tmp_path / "plain.png", tmp_path / "leaking.png"
    spans = [span("sample", 0, 0, 3)]
    steady, growing = (
        memory_trend(
            "cuda:0", tuple(Baseline(job=job, kind="", held_bytes=GIB + job * leak_bytes) for job in range(20))
        )
        for leak_bytes in (0, 12 * MIB)
    )
    draw_batch(spans, replace(FIGURES, held=(steady,)), plain)
    draw_batch(spans, replace(FIGURES, held=(steady, growing)), leaking)
    assert count(plain, LEAK_COLOUR) == 0 < count(leaking, LEAK_COLOUR)
    assert Image.open(leaking).height > Image.open(plain).height


def test_what_stands_in_its_way_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [span("sample", 0, 0, 3)]
    with pytest.raises(FileError):
        draw_batch(spans, FIGURES, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        draw_batch(spans, FIGURES, tmp_path / "batch.png")
