"""Measures the time that this pack adds to the host's start: starts ComfyUI with and without it, in turns.

Three figures per start: seconds until the host answers, its processor seconds until then (which other programs on the
machine disturb less), and the import time of this pack that the host reports, rounded to tenths of a second.

    python benchmarks/startup.py --rounds 5 --out benchmarks/results/startup.json
"""

import argparse
import json
import platform
import re
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from comfy_host import console, setup
from comfy_host.errors import HostError
from comfy_host.server import PACK_FOLDER, Server

COMPILED_MODULES = {"PYTHONDONTWRITEBYTECODE": ""}
"""Lets Python keep compiled modules, as it does by default, so that only the first start compiles them."""

LIMIT_SECONDS = 0.3
"""Longest import that the pack may add to a start."""

IMPORT_LINE = re.compile(rf"([\d.]+) seconds.*[/\\]{PACK_FOLDER}$", re.MULTILINE)


def start(host: setup.Host, *, with_pack: bool) -> "dict[str, float]":
    """Start the host, stop it, and return the figures of the start."""
    import psutil  # installed only once the environment is set up

    started = time.perf_counter()
    with Server(host, with_pack=with_pack, environment=COMPILED_MODULES) as server:
        wall_seconds = time.perf_counter() - started
        used = psutil.Process(server.pid).cpu_times()
        found = IMPORT_LINE.search(server.log())
    if with_pack and found is None:
        raise HostError("The host's log does not say that this pack was imported.")
    return {
        "wall_seconds": wall_seconds,
        "processor_seconds": used.user + used.system,
        "import_seconds": float(found[1]) if found else 0.0,
    }


def measure(host: setup.Host, rounds: int) -> "dict[str, list[dict[str, float]]]":
    """Measure `rounds` starts of either kind, after one of each that warms the disk cache and compiles modules."""
    starts: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    step = console.Step("starts")
    for number in range(rounds + 1):
        for kind, figures in starts.items():
            step.show(f"{number}/{rounds} {kind} the pack")
            figure = start(host, with_pack=kind == "with")
            if number:
                figures.append(figure)
    step.done()
    return starts


def summary(starts: "dict[str, list[dict[str, float]]]") -> "dict[str, dict[str, float]]":
    """Return the median of every figure without and with the pack, and the difference."""
    medians = {
        kind: {name: statistics.median(figure[name] for figure in figures) for name in figures[0]}
        for kind, figures in starts.items()
    }
    added = {name: medians["with"][name] - medians["without"][name] for name in medians["with"]}
    return {**medians, "added": added}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measures what this pack adds to ComfyUI's start.")
    parser.add_argument("--rounds", type=int, default=5, help="starts with the pack and without (default: 5)")
    parser.add_argument("--out", type=Path, help="also write all figures to this file, as JSON")
    options = parser.parse_args()

    def show(host: setup.Host) -> int:
        starts = measure(host, max(options.rounds, 1))
        figures = summary(starts)
        rows = [(kind, *(f"{value:.2f}" for value in values.values())) for kind, values in figures.items()]
        print("\n" + console.table(("median of the starts", "until it answers", "processor", "import"), rows))
        within = figures["added"]["import_seconds"] <= LIMIT_SECONDS
        print(f"\nThe import takes {'at most' if within else 'MORE than'} {LIMIT_SECONDS} s.")
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            machine = {
                "system": platform.platform(),
                "python": platform.python_version(),
                "date": time.strftime("%Y-%m-%d"),
            }
            options.out.write_text(
                json.dumps({"machine": machine, **figures, "starts": starts}, indent=1) + "\n", "utf-8"
            )
        return 0 if within else 1

    return setup.run(show)


if __name__ == "__main__":
    sys.exit(main())
