"""Output of the scripts."""

from __future__ import annotations

import io
import sys

import pytest
from comfy_host import console


def test_a_table_has_aligned_columns() -> None:
    text = console.table(("stage", "peak"), [("encode", "1.0 MiB"), ("sample", "12.00 GiB")])
    assert text.splitlines() == ["stage        peak", "------  ---------", "encode    1.0 MiB", "sample  12.00 GiB"]


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(None, "-"), (0, "0.0 MiB"), (3 << 19, "1.5 MiB"), (3 << 29, "1.50 GiB")]
)
def test_sizes(size_bytes: int | None, text: str) -> None:
    assert console.size(size_bytes) == text


@pytest.mark.parametrize(
    ("done", "total", "text"), [(0, 4, "[----]"), (1, 2, "[##--]"), (5, 4, "[####]"), (1, 0, "[----]")]
)
def test_bars(done: int, total: int, text: str) -> None:
    assert console.bar(done, total, 4) == text


def test_outside_a_terminal_a_step_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    step = console.Step("packages")
    step.show("torch")
    step.show("numpy")
    step.done("installed")
    assert capsys.readouterr().out == "packages         0 s  installed\n"


def test_in_a_terminal_a_line_covers_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    step = console.Step("packages")
    step.show("a long text")
    step.done("short")
    lines = terminal.getvalue().rstrip("\n").split("\r")
    assert lines[-1].rstrip().endswith("short")
    assert len(lines[-1]) == len(lines[-2])
