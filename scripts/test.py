"""All of the project's checks: lint, types and tests, those in a real ComfyUI included.

Arguments go to pytest: `python scripts/test.py -m "not host"`, `python scripts/test.py -k tiles`; `-n 0` runs the tests
in one process, where a debugger can follow.
Exit status: 0 all is well, 1 something is not, 130 interrupted.
"""

import sys

from comfy_host import process, setup
from comfy_host.errors import HostError

# Each takes some gigabytes of memory, with a real ComfyUI of its own.
SIDE_BY_SIDE = ["-n", "auto", "--maxprocesses", "4"]
CHECKS = {
    "lint": ["ruff", "check"],
    "format": ["ruff", "format", "--check"],
    "types": ["pyright"],
}


def main() -> int:
    try:
        with process.interruptible():
            setup.prepare(tests=True)
            python = setup.venv.python_of(setup.ENVIRONMENT)
            failed = [name for name, check in CHECKS.items() if not _passes(name, [python, "-m", *check])]
            if failed:
                print(f"\nFailed before the tests: {', '.join(failed)}")
            return 0 if _passes("tests", [python, "-m", "pytest", *SIDE_BY_SIDE, *sys.argv[1:]]) and not failed else 1
    except HostError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return process.EXIT_INTERRUPTED


def _passes(name: str, command: "list[object]") -> bool:
    print(f"\n== {name}", flush=True)
    return process.run([str(part) for part in command], folder=setup.PACK) == 0


if __name__ == "__main__":
    sys.exit(main())
