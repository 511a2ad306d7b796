"""`scripts/demo.py` from start to end, as a person runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import imageio.v3 as iio
import psutil
import pytest
from comfy_host import setup

pytestmark = pytest.mark.slow


@contextmanager
def demo(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The script in this environment, with its temporary files and its video below `tmp_path`."""
    host = setup.find(Path(sys.executable))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {
        **os.environ,
        "COMFYUI_PATH": str(host.folder),
        "COMFYUI_PYTHON": str(host.python),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
    }
    command = [sys.executable, str(setup.SCRIPTS / "demo.py"), "--out", str(tmp_path / "out"), *arguments]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
    assert not list(temporary.iterdir()), "temporary files were left"


def lines_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Lines printed up to and including the first with `text` in it."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"{text!r} is not in:\n" + "\n".join(lines))


def host_runs(process: subprocess.Popen[str]) -> bool:
    """Whether the script has started the host, which need not answer yet."""
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it asks other short questions before
            if any(part.endswith("main.py") for part in child.cmdline()):
                return True
    return False


def interrupt(process: subprocess.Popen[str]) -> None:
    """Send Ctrl-C; then the script and everything that it started has to be gone."""
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "the host was not running"
    process.send_signal(signal.SIGINT if sys.platform != "win32" else signal.CTRL_C_EVENT)
    assert process.wait(20) == 130
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_it_makes_a_video_and_serves_until_ctrl_c(tmp_path: Path) -> None:
    with demo(tmp_path, "--seed", "3", "--serve") as process:
        lines = lines_until(process, "is running at http://127.0.0.1:")
        interrupt(process)
    (video,) = (tmp_path / "out").iterdir()
    assert str(video) in lines
    assert iio.imread(video, plugin="FFMPEG").shape == (16, 96, 96, 3)
    header = next(number for number, line in enumerate(lines) if line.startswith("stage"))
    assert lines[header].split("  ")[0] == "stage"
    rows = [line.split() for line in lines[header + 2 : header + 5]]
    assert [row[0] for row in rows] == ["encode", "sample", "decode"]
    assert all(float(row[1]) > 0 and float(row[3]) > 0 and float(row[5]) >= 0 for row in rows)


def test_ctrl_c_while_the_host_starts_leaves_nothing(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        while not host_runs(process):
            assert process.poll() is None
        interrupt(process)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_cannot_fit_ends_with_the_nodes_own_message(tmp_path: Path) -> None:
    with demo(tmp_path, "--vram", "1MiB") as process:
        printed, _ = process.communicate(timeout=600)
    assert process.returncode == 1
    assert "does not fit" in printed
    assert "Remedy: " in printed
    assert "Traceback" not in printed
