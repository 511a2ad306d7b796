"""Simulates 10,000 jobs on 64 mixed cards, event by event, with the package's own policy, admission and device queues.

    python benchmarks/queue_simulation.py [--jobs N] [--cards N] [--rule weight|first-come] [--seed N]

Prints a table and writes docs/benchmarks/queue_simulation.json. Half of the jobs are queued at the start, the others
arrive over the first third; a job's actual time differs from its prediction by 15 % (lognormal); two cards are lost in
the middle, with the jobs that they run. The lower bound on the makespan knows all that in advance and may split jobs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import platform
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy.optimize import linprog

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from i2v_core.batch.devices.admission import AdmissionRequest, blocking_reason  # noqa: E402
from i2v_core.batch.scheduling.device_queues import DeviceQueues  # noqa: E402
from i2v_core.batch.scheduling.policy import AGEING_SECONDS, LOADED_FACTOR, PendingJob, Policy, ResourceEstimate, weight  # noqa: E402
from i2v_core.memory.device_memory import DeviceMemory  # noqa: E402
from i2v_core.planning.plan import Stage  # noqa: E402
from i2v_core.units import GIB  # noqa: E402

OUTPUT = ROOT / "docs" / "benchmarks" / "queue_simulation.json"
NOISE = 0.15
PRIORITIES = (0.5, 1.0, 1.0, 1.0, 2.0, 10.0)


@dataclass(frozen=True)
class CardKind:
    """A kind of card, with roughly the ratios of common cards."""

    gib: int

    speed: float
    """Relative to the slowest kind."""

    share: float
    """Fraction of all cards."""

    @property
    def name(self) -> str:
        return f"{self.gib} GB"


KINDS = (
    CardKind(8, 1.0, 0.30),
    CardKind(12, 1.3, 0.25),
    CardKind(16, 1.6, 0.20),
    CardKind(24, 2.6, 0.15),
    CardKind(80, 6.0, 0.10),
)


@dataclass(frozen=True)
class Shape:
    """A kind of video."""

    seconds: float
    """Time on the slowest card with `wanted_gib`; less memory takes longer."""

    least_gib: float
    """VRAM of the lowest-memory plan."""

    wanted_gib: float
    """VRAM of the fastest plan."""

    def on(self, kind: CardKind) -> ResourceEstimate | None:
        usable_gib = kind.gib - 0.75
        if usable_gib < self.least_gib:
            return None
        slower = 1.0 if usable_gib >= self.wanted_gib else 1.25
        peak_gib = min(self.wanted_gib, usable_gib)
        return ResourceEstimate(seconds=slower * self.seconds / kind.speed, peak_bytes=int(peak_gib * GIB))


SHAPES = tuple(
    Shape(seconds=seconds, least_gib=least, wanted_gib=2.2 * least)
    for seconds, least in (
        (45, 1.5), (60, 2), (90, 2.5), (120, 3), (180, 4), (240, 5), (300, 6), (420, 7), (600, 9), (900, 11),
        (1200, 14), (1800, 20), (2700, 30),
    )
)  # fmt: skip
SHAPE_SHARES = (12, 12, 12, 12, 10, 10, 8, 8, 5, 4, 3, 2, 1)


@dataclass
class Card:
    name: str
    kind: CardKind
    loaded_plan: str | None = None
    busy_seconds: float = 0.0
    running: PendingJob | None = None
    begun: float = 0.0


@dataclass
class World:
    """The state of the simulation."""

    rule: Policy
    cards: dict[str, Card]
    queues: DeviceQueues
    noise: dict[int, float]
    events: list[tuple[float, int, str, object]] = field(default_factory=list)
    started: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    runs: Counter[int] = field(default_factory=Counter)
    refused_by_admission: int = 0
    numbers: int = 0

    def post(self, at: float, what: str, of: object) -> None:
        self.numbers += 1
        heapq.heappush(self.events, (at, self.numbers, what, of))


def make_cards(count: int) -> dict[str, Card]:
    kinds = [kind for kind in KINDS for _ in range(max(1, round(kind.share * count)))]
    kinds = (kinds + [KINDS[0]] * count)[:count]
    return {f"{kind.name} #{index}": Card(f"{kind.name} #{index}", kind) for index, kind in enumerate(kinds)}


def make_jobs(count: int, cards: dict[str, Card], rng: random.Random) -> list[PendingJob]:
    shapes = rng.choices(range(len(SHAPES)), SHAPE_SHARES, k=count)
    speed = sum(card.kind.speed for card in cards.values())
    third = sum(SHAPES[shape].seconds for shape in shapes) / speed / 3
    return [
        PendingJob(
            id=index,
            added_at=0.0 if index < count // 2 else rng.uniform(0, third),
            plan=f"shape {shape}",
            on={kind.name: estimate for kind in KINDS if (estimate := SHAPES[shape].on(kind)) is not None},
            priority=rng.choice(PRIORITIES),
        )
        for index, shape in enumerate(shapes)
    ]


def start(world: World, card: Card, now: float) -> None:
    """Start the card's next job, if there is one for it."""
    memory = DeviceMemory(free_bytes=card.kind.gib * GIB, reserve_bytes=int(0.75 * GIB))

    def fits(job: PendingJob) -> bool:
        request = AdmissionRequest(
            job=job.id, stage=Stage.SAMPLE, needed_bytes=job.on[card.kind.name].peak_bytes, number=1
        )
        admitted = blocking_reason(request, (), (), memory) is None
        world.refused_by_admission += not admitted
        return admitted

    job = world.queues.take(card.name, now, card.loaded_plan, fits)
    if job is None:
        return
    world.started.setdefault(job.id, now)
    world.runs[job.id] += 1
    card.running, card.begun, card.loaded_plan = job, now, job.plan
    world.post(now + job.on[card.kind.name].seconds * world.noise[job.id], "ended", card.name)


def end(world: World, name: str, now: float) -> None:
    card = world.cards.get(name)
    if card is None or card.running is None:
        return
    world.ended[card.running.id] = now
    card.busy_seconds += now - card.begun
    card.running = None
    world.queues.mark_idle(name, now)


def lose(world: World, name: str, now: float) -> None:
    card = world.cards.pop(name)
    unplaceable = world.queues.lose(name, now)
    assert not unplaceable, "another card is as large"
    if card.running is not None:
        world.queues.add([card.running], now)


def run(world: World) -> None:
    while world.events:
        now, _, what, of = heapq.heappop(world.events)
        if what == "arrived":
            assert isinstance(of, PendingJob)
            assert not world.queues.add([of], now)
        else:
            assert isinstance(of, str)
            (end if what == "ended" else lose)(world, of, now)
        for card in world.cards.values():
            if card.running is None and len(world.queues):
                start(world, card, now)


def lower_bound(jobs: list[PendingJob], cards: list[Card], noise: dict[int, float], lost: dict[str, float]) -> float:
    """Return a time before which no order can end.

    It is the larger of two bounds: the longest single job on its fastest card; and, for arrival times r, r plus the
    time that the work arriving from r on takes if it may be split at will and spread over the cards optimally.
    """
    bound = max(job.added_at + noise[job.id] * min(it.seconds for it in job.on.values()) for job in jobs)
    staying = Counter(card.kind.name for card in cards if card.name not in lost)
    comings = sorted({job.added_at for job in jobs})
    for coming in comings[:: max(1, len(comings) // 12)]:
        amounts = dict.fromkeys(range(len(SHAPES)), 0.0)
        for job in jobs:
            if job.added_at >= coming:
                amounts[int(job.plan.split()[1])] += noise[job.id]
        before_loss = dict.fromkeys((card.kind.name for card in cards), 0.0)
        for card in cards:
            before_loss[card.kind.name] += max(0.0, lost.get(card.name, coming) - coming)
        bound = max(bound, coming + _fractional_seconds(amounts, staying, before_loss))
    return bound


def _fractional_seconds(amounts: dict[int, float], staying: Counter[str], before_loss: dict[str, float]) -> float:
    """Solve the linear relaxation, whose variables are the amount of each shape on each kind of card, and the seconds.

    Args:
        amounts: jobs of each shape.
        staying: cards of each kind that stay to the end.
        before_loss: seconds that the lost cards of each kind have together.
    """
    placements = [(shape, kind, it.seconds) for shape in amounts for kind in KINDS if (it := SHAPES[shape].on(kind))]
    names = list(before_loss)
    shapes = list(amounts)
    loads = [
        [seconds if kind.name == name else 0.0 for _, kind, seconds in placements] + [-staying[name]] for name in names
    ]
    sums = [[float(shape == it) for it, _, _ in placements] + [0.0] for shape in shapes]
    found = linprog(
        [0.0] * len(placements) + [1.0],
        A_ub=loads,
        b_ub=[before_loss[name] for name in names],
        A_eq=sums,
        b_eq=[float(amounts[shape]) for shape in shapes],
    )
    assert found.success, found.message
    return float(found.fun)


def starved(jobs: list[PendingJob], started: dict[int, float]) -> int:
    """Count jobs overtaken by one that arrived later than ageing allows, whatever the two jobs' weights."""
    weights = [weight(it, job.priority) for job in jobs for it in job.on.values()]
    allowed_seconds = AGEING_SECONDS * math.log2(LOADED_FACTOR * max(weights) / min(weights))
    count, newest = 0, 0.0
    for job in sorted(jobs, key=lambda it: started[it.id]):
        count += newest > job.added_at + allowed_seconds
        newest = max(newest, job.added_at)
    return count


def simulate(job_count: int, card_count: int, rule: Policy, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    cards = make_cards(card_count)
    jobs = make_jobs(job_count, cards, rng)
    noise = {job.id: rng.lognormvariate(0, NOISE) for job in jobs}
    all_cards = list(cards.values())
    world = World(rule, cards, DeviceQueues({name: card.kind.name for name, card in cards.items()}, rule), noise)
    lost: dict[str, float] = {}
    if card_count > 2:
        halfway = lower_bound(jobs, all_cards, noise, lost) / 2
        lost = {all_cards[0].name: halfway, all_cards[-1].name: halfway}
    bound = lower_bound(jobs, all_cards, noise, lost)
    assert not world.queues.add([job for job in jobs if not job.added_at], 0.0)
    for job in jobs:
        if job.added_at:
            world.post(job.added_at, "arrived", job)
    for name, at in lost.items():
        world.post(at, "lost", name)
    began = time.perf_counter()
    for card in all_cards:
        start(world, card, 0.0)
    run(world)
    waits = [world.started[job.id] - job.added_at for job in jobs]
    urgent = [world.started[job.id] - job.added_at for job in jobs if job.priority == max(PRIORITIES)]
    makespan = max(world.ended.values())
    return {
        "rule": rule.value,
        "jobs": job_count,
        "cards": card_count,
        "done": len(world.ended),
        "run_again_after_a_loss": sum(count - 1 for count in world.runs.values()),
        "makespan_seconds": round(makespan),
        "lower_bound_seconds": round(bound),
        "makespan_over_bound": round(makespan / bound, 4),
        "busy_share": round(
            sum(card.busy_seconds * card.kind.speed for card in all_cards)
            / (makespan * sum(card.kind.speed for card in all_cards)), 3,
        ),
        "wait_seconds": {
            "median": round(statistics.median(waits)),
            "95 %": round(statistics.quantiles(waits, n=20)[-1]),
            "longest": round(max(waits)),
            "median of priority 10": round(statistics.median(urgent)),
        },
        "starved": starved(jobs, world.started),
        "scheduling_ms_a_job": round(1000 * (time.perf_counter() - began) / job_count, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate the queue on many cards.")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--cards", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rule", choices=[rule.value for rule in Policy], help="default: both")
    options = parser.parse_args()
    rules = [Policy(options.rule)] if options.rule else list(Policy)
    rows = [simulate(options.jobs, options.cards, rule, options.seed) for rule in rules]
    for name in rows[0]:
        for key in rows[0]["wait_seconds"] if name == "wait_seconds" else [""]:
            cells = [row[name][key] if key else row[name] for row in rows]
            print(f"{name} {key}".ljust(42) + "".join(f"{cell!s:>12}" for cell in cells))
    content = {"seed": options.seed, "python": platform.python_version(), "kinds": [asdict(it) for it in KINDS]}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps({**content, "rows": rows}, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {OUTPUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
