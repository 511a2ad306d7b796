"""Measures how long VRAM Budget's live plan takes on the page: processor seconds per bundled architecture.

    python benchmarks/live_verdict.py --json docs/benchmarks/live-verdict-cpu.json

Each model is planned in a process of its own, as the page's route plans: first at its default size, which imports the
model's code and builds its skeletons (including the collection of the garbage that this leaves); then at new sizes, for
cards that they fit and for one that nothing fits; and after each refusal, the search for what would fit instead. The
table shows the median of the sizes and the longest. Measured is the processor time of one thread, which other programs
disturb less than wall-clock time; `loop`, a million iterations in Python, calibrates for the speed of the processor.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from i2v_core.families import bundled_architecture, bundled_models, family_of
from i2v_core.memory.device import DeviceFacts
from i2v_core.planning.cards import CARDS
from i2v_core.planning.planner import find_plan, make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.search import lowest_memory_stages
from i2v_core.planning.suggestions import NothingFitsError
from i2v_core.units import MIB

LIMIT_SECONDS = 0.3
"""Longest time that a plan at a new size may take."""

CARD_NAMES = ("8 GB", "24 GB")
TOO_LITTLE = Budget(free_bytes=96 * MIB)
SIZES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Processor seconds of planning for one model; lists have one entry per size."""

    model: str

    loop: float
    """A million iterations in Python, for comparison."""

    first: float
    """The first plan, at the default size."""

    fits: dict[str, list[float]]
    """Plans that fit, by the card's name."""

    refused: list[float]
    """Plans that do not fit."""

    fixes: list[float]
    """Searches for what would fit instead."""

    @property
    def verdicts(self) -> list[float]:
        """Seconds of all plans at new sizes."""
        return [*(it for of_card in self.fits.values() for it in of_card), *self.refused]


def measure(model: str) -> Figures:
    requests, cards = new_requests(model), [CARDS[name] for name in CARD_NAMES]
    device = cards[0].facts
    first = verdict_seconds(next(requests), Budget(free_bytes=cards[0].free_bytes), device, fits=True)
    first += collection_seconds()
    fits: dict[str, list[float]] = {}
    for card in cards:
        budget, some = Budget(free_bytes=card.free_bytes), islice(requests, SIZES)
        fits[card.name] = [verdict_seconds(request, budget, device, fits=True) for request in some]
    too_large = list(islice(requests, SIZES))
    return Figures(
        model=model,
        loop=loop_seconds(),
        first=first,
        fits=fits,
        refused=[verdict_seconds(request, TOO_LITTLE, device, fits=False) for request in too_large],
        fixes=[fixes_seconds(request, TOO_LITTLE, device) for request in too_large],
    )


def new_requests(model: str) -> Iterator[Request]:
    """Yield a request at the default size, then at ever narrower ones."""
    architecture = bundled_architecture(model)
    facts = family_of(architecture).facts
    for width_pixels in range(facts.default_size.width_pixels, facts.min_side_pixels, -2 * facts.size_multiple):
        yield Request(architecture=architecture, size=replace(facts.default_size, width_pixels=width_pixels))


def verdict_seconds(request: Request, budget: Budget, device: DeviceFacts, *, fits: bool) -> float:
    started = time.process_time()
    found = find_plan(request, budget, device) is not None
    if not found:
        lowest_memory_stages(request, device, budget.host_free_bytes)  # the page shows these for a refusal
    seconds = time.process_time() - started
    assert found is fits, f"{request.size} fits {budget.usable_bytes} bytes: {found}"
    return seconds


def fixes_seconds(request: Request, budget: Budget, device: DeviceFacts) -> float:
    started = time.process_time()
    try:
        make_plan(request, budget, device)
    except NothingFitsError:
        return time.process_time() - started
    raise AssertionError(f"{request.size} fits {budget.usable_bytes} bytes")


def collection_seconds() -> float:
    """Collect the garbage of the first plan, which would otherwise be collected during a later one."""
    started = time.process_time()
    gc.collect()
    return time.process_time() - started


def loop_seconds() -> float:
    started, total = time.process_time(), 0
    for turn in range(1_000_000):
        total += turn * turn
    return time.process_time() - started


def table(figures: list[Figures]) -> str:
    fits = [f"new size, fits {name}" for name in CARD_NAMES]
    titles = ["model", "first plan", *fits, "new size, refused", "what would fit instead", "loop"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for it in figures:
        ranges = [*(it.fits[name] for name in CARD_NAMES), it.refused, it.fixes]
        cells = [f"{statistics.median(seconds):.2f} s (≤ {max(seconds):.2f})" for seconds in ranges]
        lines.append("| " + " | ".join([it.model, f"{it.first:.1f} s", *cells, f"{it.loop:.3f} s"]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # for the processes that are started
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        models = bundled_models()
        figures = list(tqdm(processes.imap(measure, models, chunksize=1), total=len(models), unit="model"))
    print(table(figures))
    longest = max(seconds for it in figures for seconds in it.verdicts)
    within = longest <= LIMIT_SECONDS
    print(f"\nThe longest verdict takes {longest:.2f} s, {'within' if within else 'MORE than'} {LIMIT_SECONDS} s.")
    if given.json is not None:
        about = {
            "system": platform.platform(),
            "python": platform.python_version(),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        }
        given.json.write_text(json.dumps({**about, "models": [asdict(it) for it in figures]}, indent=1) + "\n", "utf-8")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
