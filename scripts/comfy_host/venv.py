"""Creates, completes and repairs the project's own virtual environment; does nothing once it is complete."""

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
"""Later versions of pip can print progress as numbers; the one in a new environment may be older."""


def python_of(environment: Path) -> Path:
    """Return the interpreter of the virtual environment in the folder `environment`."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def ensure(environment: Path, requirements: Mapping[str, Path], label: str = "packages") -> Path:
    """Install all requirement files into `environment` if needed, and return its interpreter.

    A stamp in the environment holds the hash of every requirement file that was installed completely; if all are there,
    nothing is done, else the missing ones are installed. An environment that does not run, or in which pip was stopped
    while unpacking, is created again: pip takes a half-unpacked package for a complete one.

    Args:
        environment: the environment's folder.
        requirements: the requirement files by their name in the stamp.
        label: name of the step on the console.

    Raises:
        SetupError: the environment could not be created or completed; the message gives cause and remedy.
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
    """Download the source archive that the file `requirements` pins, without dependencies, into `folder`."""
    flags = ["--no-deps", "--no-build-isolation", "--ignore-requires-python", "--no-binary", ":all:"]
    for _ in _pip(python, ["download", *flags, "--dest", str(folder), "-r", str(requirements)], step):
        pass


def install_apart(python: Path, requirements: Path, folder: Path, step: Step) -> None:
    """Install what the file `requirements` pins, without dependencies, into `folder`."""
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
        print(f"Note: tested with Python {oldest} to {newest}; some packages may not support {running} yet.")


def _pip(python: Path, arguments: Sequence[str], step: Step) -> Iterator[str]:
    """Run pip and yield the lines that it prints, with `step` showing its status.

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
            "Check the connection to the package index and the free disk space. The next run resumes from here."
        )


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    """Yield the lines that `child` prints, and an empty one after each second without output, to update the clock."""
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
    """Return the status to show after pip printed `line`; `shown` is the current one."""
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
