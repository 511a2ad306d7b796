"""Files that exist whole or not at all."""

from __future__ import annotations

import errno
from datetime import datetime
from pathlib import Path

import pytest

from i2v_core.errors import FileError
from i2v_core.files import atomic_file, file_errors, with_date


def make(path: Path, content: str, *, fail: bool = False) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(content)
        assert temporary.parent == path.parent
        if fail:
            raise KeyboardInterrupt


def test_the_name_is_given_when_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    make(path, "first")
    make(path, "second")
    assert path.read_text() == "second"
    with pytest.raises(KeyboardInterrupt):
        make(path, "third", fail=True)
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_name_as_long_as_the_system_allows_can_be_had(tmp_path: Path) -> None:
    make(tmp_path / ("x" * 255), "content")


def test_too_long_a_name_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="too long"), atomic_file(tmp_path / ("x" * 256)):
        raise AssertionError("it went on")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("video/i2v", "video/i2v"),
        ("%date%/i2v", "2031-07-09/i2v"),
        ("%date:yyyy/MM%/%date:dd_hhmmss%", "2031/07/09_050803"),
        ("%date:yy-M-d h.m.s%", "31-7-9 5.8.3"),
        ("100% of %width% %dated%", "100% of %width% %dated%"),
    ],
)
def test_dates_are_written_as_the_format_says(text: str, expected: str) -> None:
    assert with_date(text, datetime(2031, 7, 9, 5, 8, 3)) == expected


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "permission is denied"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_system_error_names_the_file_and_the_cause(code: int, said: str) -> None:
    with pytest.raises(FileError) as error, file_errors(Path("/folder/video.mp4")):
        raise OSError(code, "Input/output error")
    assert "/folder/video.mp4 cannot be written: " in error.value.problem
    assert said in error.value.problem
    assert error.value.remedy
