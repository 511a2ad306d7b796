"""Sets up a host from a bare Python: chooses interpreter and ComfyUI, and installs what is missing.

Two environment variables select the user's own ComfyUI: `COMFYUI_PATH`, its folder, and `COMFYUI_PYTHON`, its
interpreter. With the folder alone, the host's requirements are installed into the project's environment; with the
interpreter too, nothing is installed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import frontend, process, source, venv
from .errors import HostError, SetupError

PACK = Path(__file__).resolve().parents[2]
SCRIPTS = PACK / "scripts"
ENVIRONMENT = PACK / ".venv"
CACHE = PACK / ".host"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A ComfyUI that is ready to start: its folder, and the interpreter that has what it and this pack need."""

    folder: Path
    python: Path


def prepare(*, tests: bool = False) -> Host:
    """Set up everything that is missing, showing each step.

    Args:
        tests: also install the tools of the project's checks into its environment, whatever the host runs in, the
            newer frontend that is tested as well as the host's own, and older hosts.

    Raises:
        SetupError: something is missing that cannot be installed; the message says what to do.
    """
    folder, python = _own_folder(), _own_python()  # report problems with them before changing anything
    if python is None or tests:
        python = _fill_environment(folder, tests=tests)
    if tests:
        frontend.ensure(CACHE, python)
        for version in source.OLDER_VERSIONS:
            source.ensure(CACHE, python, version)
    return find(python)


def run(job: Callable[[Host], int]) -> int:
    """Set up a host, continue this script in its interpreter, and run `job` there.

    Returns the script's exit status; prints the message of a `HostError` or an interrupt.
    """
    try:
        with process.interruptible():
            host = prepare()
            status = process.hand_over(host.python, sys.argv)
            return job(host) if status is None else status
    except HostError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return process.EXIT_INTERRUPTED


def find(python: Path) -> Host:
    """Return the host for an interpreter `python` that has all requirements; installs nothing.

    Raises:
        SetupError: as in `prepare`.
    """
    return Host(folder=_own_folder() or source.ensure(CACHE, python), python=_own_python() or python)


def _fill_environment(own_folder: Path | None, *, tests: bool) -> Path:
    python = venv.ensure(ENVIRONMENT, {"setup": SCRIPTS / "requirements-setup.txt"}, label="installer")
    folder = own_folder or source.ensure(CACHE, python)
    requirements = {
        "host": folder / "requirements.txt",
        "pack": PACK / "requirements.txt",
        "pins": SCRIPTS / "requirements-host.txt",
    }
    if tests:
        requirements["tests"] = SCRIPTS / "requirements-dev.txt"
    return venv.ensure(ENVIRONMENT, requirements)


def _own_folder() -> Path | None:
    """Return the folder of the user's own ComfyUI, or None if `COMFYUI_PATH` is not set."""
    value = os.environ.get("COMFYUI_PATH")
    if not value:
        return None
    folder = Path(value).expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH={value} is not a ComfyUI folder: it lacks main.py or the folder comfy.")
    return folder


def _own_python() -> Path | None:
    """Return the interpreter of the user's own ComfyUI, or None if `COMFYUI_PYTHON` is not set."""
    value = os.environ.get("COMFYUI_PYTHON")
    if not value:
        return None
    if _own_folder() is None:
        raise SetupError("COMFYUI_PYTHON is set but COMFYUI_PATH is not: set both, or COMFYUI_PATH alone.")
    python = Path(value).expanduser()
    names = re.findall(r"^[A-Za-z][\w.-]*", (PACK / "requirements.txt").read_text("utf-8"), re.MULTILINE)
    missing = process.ask(
        python,
        "import importlib.metadata as m\n"
        "have = {d.metadata['Name'].lower().replace('_', '-') for d in m.distributions()}\n"
        f"print(*(n for n in {names!r} if n.lower().replace('_', '-') not in have))",
    )
    if missing is None:
        raise SetupError(f"COMFYUI_PYTHON={value} cannot be run.")
    if missing:
        raise SetupError(
            f"{python} lacks {', '.join(missing.split())}, which this pack needs. Install them with:\n"
            f"  {python} -m pip install -r {PACK / 'requirements.txt'}"
        )
    return python
