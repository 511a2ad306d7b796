"""All of the project's checks: lint, format, imports, types and tests, those in a real ComfyUI and a browser included.

    python scripts/test.py              everything, in about 25 minutes on two cores
    python scripts/test.py --fast       the same without the tests marked host, browser, slow or gpu, in two minutes
    python scripts/test.py tests/batch  other arguments go to pytest; so do -m "not host", -k tiles, and -n 0, which
                                        runs the tests in one process, where a debugger can follow

Exit status: 0 all is well, 1 something is not, 130 interrupted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from comfy_host import process, setup
from comfy_host.errors import HostError

# Each process takes some gigabytes of memory, with a real ComfyUI of its own. With `worksteal` it runs tests that
# stand next to each other, which share models, traces and that ComfyUI.
SIDE_BY_SIDE = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
FAST = ["-m", "not host and not browser and not slow and not gpu"]
CHECKS = {
    "lint": ["-m", "ruff", "check"],
    "format": ["-m", "ruff", "format", "--check"],
    "imports": ["-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_logo=True))"],
}
TYPES = ["-m", "pyright"]  # half a minute on one core


def main() -> int:
    arguments = sys.argv[1:]
    if "--fast" in arguments:
        arguments = [*FAST, *(it for it in arguments if it != "--fast")]
    try:
        with process.interruptible():
            setup.prepare(tests=True)
            failed = _failed(setup.venv.python_of(setup.ENVIRONMENT), arguments)
    except HostError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return process.EXIT_INTERRUPTED
    if failed:
        print(f"\nFailed: {', '.join(failed)}")
    return 1 if failed else 0


def _failed(python: Path, arguments: Sequence[str]) -> list[str]:
    """Run all checks, types beside the tests, and return the names of those that failed."""
    with _beside([python, *TYPES]) as types_pass:
        passed = {name: _passes(name, [python, *check]) for name, check in CHECKS.items()}
        passed["tests"] = _passes("tests", [python, "-m", "pytest", *SIDE_BY_SIDE, *arguments])
        print("\n== types", flush=True)
        passed["types"] = types_pass()
    return [name for name, well in passed.items() if not well]


def _passes(name: str, command: Sequence[str | Path]) -> bool:
    print(f"\n== {name}", flush=True)
    return process.run(command, folder=setup.PACK) == 0


@contextmanager
def _beside(command: Sequence[str | Path]) -> Iterator[Callable[[], bool]]:
    """Run a check while the context lasts; what is yielded waits for its end, prints its output, and says if it passed.

    An interrupt ends it too.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        running: subprocess.Popen[str] | None = None

        def passes() -> bool:
            assert running is not None
            status = running.wait()
            output.seek(0)
            print(output.read(), end="", flush=True)
            return status == 0

        try:
            with process.interrupts_later():
                running = process.start(command, output=output, folder=setup.PACK)
            yield passes
        finally:
            if running is not None:
                process.stop(running)


if __name__ == "__main__":
    sys.exit(main())
