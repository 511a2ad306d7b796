"""Nothing that a script starts outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from comfy_host import process

# A child that ignores being asked to end, and starts one that does so too; it prints the other's id.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, __file__])
    print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int, patience_seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_stop_ends_the_whole_tree_also_against_its_will(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.3)
    (tmp_path / "stubborn.py").write_text(STUBBORN, "utf-8")
    child = process.start([sys.executable, tmp_path / "stubborn.py", "parent"], output=subprocess.PIPE)
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    assert psutil.pid_exists(grandchild)
    process.stop(child)
    assert gone(child.pid)
    assert gone(grandchild)


def test_stop_may_be_called_of_what_has_ended() -> None:
    child = process.start([sys.executable, "-c", "pass"])
    assert child.wait() == 0
    process.stop(child)
    process.stop(child)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_runs_every_finally(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.append({str(Path(process.__file__).parents[1])!r})\n"
        "from comfy_host import process\n"
        "with process.interruptible():\n"
        "    child = process.start([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "    try:\n"
        "        print(child.pid, flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        process.stop(child)\n",
        "utf-8",
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    os.kill(parent.pid, getattr(signal, name))
    assert parent.wait(20) != 0
    assert gone(child)


def test_ask_returns_the_answer_or_none() -> None:
    python = Path(sys.executable)
    assert process.ask(python, "print(6 * 7)") == "42"
    assert process.ask(python, "raise SystemExit(1)") is None
    assert process.ask(python.with_name("no-such-python"), "print(1)") is None


def test_capture_returns_status_and_output() -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    status, printed = process.capture([sys.executable, "-c", code])
    assert status == 3
    assert set(printed.split()) == {"out", "err"}


def interrupt_itself() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)


@pytest.mark.skipif(sys.platform == "win32", reason="there os.kill ends the process")
def test_an_interrupt_while_a_process_starts_is_raised_when_it_is_held() -> None:
    held: list[str] = []

    def start() -> None:
        with process.interrupts_later():
            interrupt_itself()
            held.append("the process")

    with process.interruptible():
        with pytest.raises(KeyboardInterrupt):
            start()
        assert held
        with process.interrupts_later():
            held.append("another")
        with pytest.raises(KeyboardInterrupt):
            interrupt_itself()
