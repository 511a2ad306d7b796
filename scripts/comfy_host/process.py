"""Child processes that end together with their descendants, whatever ends the script that started them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

PATIENCE_SECONDS = 10.0
CALM_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP's threads spin by default while they wait for each other, which on a busy machine makes a small model 60 times
slower (measured on two cores: 0.1 s became 6 s)."""
EXIT_INTERRUPTED = 130
"""The exit status of a script ended by Ctrl-C, as shells have it."""


def start(
    command: Sequence[str | Path],
    *,
    output: IO[str] | int | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start `command` as the head of a process tree of its own, which `stop` can end as a whole.

    A terminal's Ctrl-C reaches this script only, so that it decides in which order things end. `output` takes both
    standard output and error; `environment` is added to this script's own and to `CALM_THREADS`.
    """
    windows = sys.platform == "win32"
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        cwd=folder,
        env={**CALM_THREADS, **os.environ, **(environment or {})},
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=not windows,
        creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if sys.platform == "win32" else 0,
    )


def stop(process: subprocess.Popen[str]) -> None:
    """End `process` and its descendants: politely first, by force after `PATIENCE_SECONDS` or a second Ctrl-C."""
    if sys.platform == "win32":
        if process.poll() is None:
            subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True, check=False)
            process.wait()
        return
    try:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_SECONDS)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: int) -> None:
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # Darwin says EPERM of a group of the dead
            os.killpg(group, number)


def run(command: Sequence[str | Path], *, folder: Path | None = None) -> int:
    """Run `command` with this script's output and return its exit status; its whole tree ends with it."""
    process = None
    try:
        with interrupts_later():
            process = start(command, folder=folder)
        return process.wait()
    finally:
        if process is not None:
            stop(process)


def capture(command: Sequence[str | Path]) -> tuple[int, str]:
    """Run `command` and return its exit status and all that it printed; its whole tree ends with it."""
    process = None
    try:
        with interrupts_later():
            process = start(command, output=subprocess.PIPE)
        printed, _ = process.communicate()
        return process.returncode, printed.strip()
    finally:
        if process is not None:
            stop(process)


def ask(python: Path, code: str) -> str | None:
    """Return the last line that `python -c code` prints, or None if it cannot be run or fails."""
    try:
        status, printed = capture([python, "-c", code])
    except OSError:
        return None
    return None if status else printed.rpartition("\n")[2]


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn every signal that asks this script to end into a KeyboardInterrupt, so that each `finally` is run.

    That includes SIGINT itself, which shells disable for background processes.
    """
    with _handled_by(signal.default_int_handler):
        yield


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Defer interrupts to the end of the block.

    For starting a process and storing its handle: an interrupt between the two would leave it running.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread
        return
    received: list[int] = []
    with _handled_by(lambda number, _: received.append(number)):
        yield
    if received:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Send signals that ask this script to end to `handler` inside the block."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    numbers: list[int] = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def hand_over(python: Path, arguments: Sequence[str]) -> int | None:
    """Run this script again in `python`'s environment; return its exit status, or None if already in it."""
    if ask(python, "import sys; print(sys.prefix)") == sys.prefix:
        return None
    command = [str(python), *arguments]
    sys.stdout.flush()
    if sys.platform != "win32":
        os.execv(command[0], command)
    # exec on Windows returns to the shell at once, with the script still running: wait for it instead, and leave
    # Ctrl-C, which reaches both, to the script itself.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
