"""The project's own virtual environment: made, completed, repaired, and left alone once it is right."""

from __future__ import annotations

import collections
import hashlib
import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from . import process
from .console import Step, bar, size
from .errors import SetupError

TESTED_PYTHONS = ("3.10", "3.13")
STAMP = "i2v-requirements.json"
UNPACKING = "i2v-unpacking"
INSTALLING = "Installing collected packages"
ERROR_LINES = 25
RAW_PROGRESS_PIP = 24
"""Later pips can print their progress as numbers; the one that a new environment has may be older."""


def python_of(environment: Path) -> Path:
    """The interpreter of the virtual environment in the folder `environment`."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def ensure(environment: Path, requirements: Mapping[str, Path], label: str = "packages") -> Path:
    """Make sure that `environment` has all that the requirement files name, and return its interpreter.

    A stamp in the environment holds the hash of every file that was installed to its end; where all are there, nothing
    is done. An environment without it is completed. One that does not run, or in which packages were being unpacked
    when pip was ended, is made again: pip takes a half-unpacked package for a whole one.

    Args:
        environment: the environment's folder.
        requirements: the files, each under the name that it has in the stamp.
        label: what the step is called while it runs.

    Raises:
        SetupError: the environment could not be made or filled; the message says why and what helps.
    """
    python = python_of(environment)
    unpacking = environment / UNPACKING
    if unpacking.exists() or process.ask(python, "import pip") is None:
        _create(environment)
    wanted = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in requirements.items()}
    stamp = environment / STAMP
    installed: dict[str, str] = json.loads(stamp.read_text("utf-8")) if stamp.is_file() else {}
    if wanted.items() <= installed.items():
        return python
    stamp.unlink(missing_ok=True)
    step = Step(label)
    for line in _pip(
        python, ["install", *(part for path in requirements.values() for part in ("-r", str(path)))], step
    ):
        if line.startswith(INSTALLING):
            unpacking.touch()
    unpacking.unlink(missing_ok=True)
    stamp.write_text(json.dumps({**installed, **wanted}, indent=1), "utf-8")
    step.done("installed")
    return python


def download(python: Path, requirements: Path, folder: Path, step: Step) -> None:
    """Download, without what it depends on, the source archive that the file `requirements` pins, into `folder`."""
    flags = ["--no-deps", "--no-build-isolation", "--ignore-requires-python", "--no-binary", ":all:"]
    for _ in _pip(python, ["download", *flags, "--dest", str(folder), "-r", str(requirements)], step):
        pass


def install_apart(python: Path, requirements: Path, folder: Path, step: Step) -> None:
    """Install what the file `requirements` pins, and nothing that it depends on, into `folder` and nowhere else."""
    for _ in _pip(
        python, ["install", "--no-deps", "--upgrade", "--target", str(folder), "-r", str(requirements)], step
    ):
        pass


def _create(environment: Path) -> None:
    step = Step("environment")
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    status, printed = process.capture([sys.executable, "-m", "venv", "--clear", environment])
    if status:
        raise SetupError(
            f"{sys.executable} -m venv {environment} failed:\n{printed}\n"
            f"On Debian and Ubuntu, `apt install python{running}-venv` adds what is missing."
        )
    step.done(f"{environment} (Python {running})")
    oldest, newest = TESTED_PYTHONS
    if sys.version_info[:2] > tuple(int(part) for part in newest.split(".")):
        print(f"Note: tried with Python {oldest} to {newest}; some packages may not be there yet for {running}.")


def _pip(python: Path, arguments: Sequence[str], step: Step) -> Iterator[str]:
    """The lines that pip prints as it runs, with `step` showing what it is at.

    Raises:
        SetupError: pip failed; the message has its last lines.
    """
    version = process.ask(python, "import pip; print(pip.__version__)") or "0"
    progress = "raw" if int(version.partition(".")[0]) > RAW_PROGRESS_PIP else "off"
    command = [python, "-m", "pip", "--no-input", *arguments, "--progress-bar", progress]
    child = process.start(command, output=subprocess.PIPE)
    tail: collections.deque[str] = collections.deque(maxlen=ERROR_LINES)
    shown = "looking for packages"
    try:
        for line in _lines(child):
            if line:
                tail.append(line)
                shown = _summary(line, shown)
                yield line
            step.show(shown)
        status = child.wait()
    finally:
        process.stop(child)
    if status:
        listing = "\n".join(line for line in tail if not line.startswith("Progress "))
        raise SetupError(
            f"pip failed (exit status {status}). Its last lines:\n{listing}\n"
            "Is there a connection to a package index, and room on the disk? The next run goes on from here."
        )


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    """The lines that `child` prints, and an empty one in every second without any, so that the clock goes on."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line.strip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1.0)
        except queue.Empty:
            line = ""
        if line is None:
            return
        yield line


def _summary(line: str, shown: str) -> str:
    """What to show after pip printed `line`, where `shown` is shown now."""
    if match := re.match(r"Progress (\d+) of (\d+)", line):
        done, total = int(match[1]), int(match[2])
        return f"{shown.partition('  [')[0]}  {bar(done, total, 20)} {size(total)}"
    if match := re.match(r"(?:Downloading|Using cached) (?:\S*/)?([\w.]+)-(\d[\w.]*)", line):
        return f"{match[1]} {match[2]}"
    if match := re.match(r"Collecting ([\w.-]+)", line):
        return f"looking for {match[1]}"
    if line.startswith(INSTALLING):
        return f"unpacking {line.count(',') + 1} packages"
    return shown
