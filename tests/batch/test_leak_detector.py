"""A leak of 1 MiB a job is found within 30 jobs; noise, warm-up, steps and larger jobs are not taken for one."""

from __future__ import annotations

import random
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2v_core.batch.devices.device import LocalDevice
from i2v_core.batch.engines.local import LocalEngine
from i2v_core.batch.engines.settings import EngineSettings
from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.events import Event, EventKind, Span
from i2v_core.batch.monitoring.leak_detector import (
    HOST,
    Baseline,
    LeakDetector,
    MemoryTrend,
    held_now,
    memory_trend,
)
from i2v_core.batch.monitoring.metrics import MetricsCollector
from i2v_core.families import I2VModel
from i2v_core.units import GIB, MIB

from .conftest import MakeJob

CARD = "cuda:0"


def trend_of(held_bytes: Sequence[float], kinds: Sequence[Hashable] | None = None) -> MemoryTrend:
    names = kinds or [None] * len(held_bytes)
    pairs = enumerate(zip(held_bytes, names, strict=True))
    return memory_trend(
        CARD, tuple(Baseline(job=job, kind=kind, held_bytes=round(held)) for job, (held, kind) in pairs)
    )


@given(
    leak=st.integers(5 * MIB, GIB),
    noise=st.lists(st.floats(0, 1), min_size=20, max_size=60),
    start=st.integers(0, 64 * GIB),
    kinds=st.integers(1, 3),
)
def test_what_grows_with_each_job_is_suspected(leak: int, noise: list[float], start: int, kinds: int) -> None:
    """A leak is found under noise of half a leaked job, and in a list of up to three kinds of jobs."""
    found = trend_of(
        [start + leak * (job + share / 2) for job, share in enumerate(noise)],
        [f"kind {job % kinds}" for job in range(len(noise))],
    )
    assert found.suspected
    assert abs(found.growth_bytes - leak) <= leak / 2 + 1


@given(held=st.lists(st.integers(0, 8 * GIB), min_size=1, max_size=60), more=st.integers(0, 64 * GIB))
def test_a_level_counts_by_its_changes_alone(held: list[int], more: int) -> None:
    plain, raised = trend_of(held), trend_of([it + more for it in held])
    assert (plain.suspected, plain.growth_bytes) == (raised.suspected, raised.growth_bytes)


@given(held=st.lists(st.integers(0, 8 * GIB), min_size=1, max_size=60))
def test_what_never_grows_is_not_suspected(held: list[int]) -> None:
    assert not trend_of(sorted(held, reverse=True)).suspected


@given(before=st.integers(0, 30), after=st.integers(0, 30), step=st.integers(0, 64 * GIB))
def test_a_step_is_not_suspected(before: int, after: int, step: int) -> None:
    """A step stays and does not grow, as when a job first needs another precision."""
    assert not trend_of([GIB] * (before + 1) + [GIB + step] * after).suspected


@dataclass(frozen=True, kw_only=True)
class SimulatedBatch:
    """Levels after the jobs of a batch, whose kinds need different memory."""

    kinds: list[int]
    held_bytes: list[int]

    @classmethod
    def clean(cls, rng: np.random.Generator, jobs: int) -> SimulatedBatch:
        """Noise of up to 1 GB, a first filling of caches by each kind, and mostly a step somewhere."""
        kind_count = int(rng.integers(1, 5))
        kinds = (
            np.arange(jobs) % kind_count,  # alternating
            np.arange(jobs) * kind_count // jobs,  # from small to large
            rng.integers(0, kind_count, jobs),
        )[rng.integers(0, 3)]
        held_bytes = 8 * GIB + kinds * 500 * MIB + rng.normal(0, rng.choice([0.1, 1, 20, 1000]) * MIB, jobs)
        for kind in range(kind_count):
            for job in np.flatnonzero(kinds == kind)[:2]:
                held_bytes[job:] += rng.uniform(0, 200) * MIB
        if rng.random() < 0.8:
            held_bytes[rng.integers(0, jobs) :] += rng.uniform(0, 2000) * MIB
        return cls(kinds=kinds.tolist(), held_bytes=[int(it) for it in held_bytes])

    @classmethod
    def leaking(cls, rng: np.random.Generator, jobs: int, kind_count: int) -> SimulatedBatch:
        """1 MiB a job, under noise of half as much."""
        kinds = np.arange(jobs) % kind_count
        held_bytes = 8 * GIB + kinds * 500 * MIB + MIB * np.arange(jobs) + rng.normal(0, MIB / 2, jobs)
        return cls(kinds=kinds.tolist(), held_bytes=[int(it) for it in held_bytes])

    def first_alarm(self, every: int = 1) -> int | None:
        """The job after which a leak is suspected first, of those that are looked at."""
        detector = LeakDetector()
        for job, (kind, held_bytes) in enumerate(zip(self.kinds, self.held_bytes, strict=True), start=1):
            detector.read({HOST: held_bytes})
            detector.finished(CARD, kind)
            if job % every == 0 and any(it.suspected for it in detector.trends()):
                return job
        return None


def test_a_thousand_clean_batches_raise_no_alarm() -> None:
    """Each is looked at after every eighth of its 64 jobs."""
    rng = np.random.default_rng(0)
    began = time.process_time()
    alarms = [SimulatedBatch.clean(rng, 64).first_alarm(every=8) for _ in range(1000)]
    assert alarms == [None] * 1000
    assert time.process_time() - began < 4  # 1.3 s when it was written


@pytest.mark.parametrize("kind_count", [1, 2, 3])
def test_a_leak_of_a_mebibyte_a_job_is_found_within_thirty_jobs(kind_count: int) -> None:
    rng = np.random.default_rng(0)
    found = [SimulatedBatch.leaking(rng, 30, kind_count).first_alarm() for _ in range(100)]
    assert None not in found


@pytest.mark.parametrize("noise_bytes", [20 * MIB, GIB])
def test_a_leak_is_found_under_noise_of_two_leaked_jobs(noise_bytes: int) -> None:
    values = [np.random.default_rng(seed).normal(8 * GIB, noise_bytes, 60) for seed in range(200)]
    assert not any(trend_of(it.tolist()).suspected for it in values)
    assert all(trend_of((it + noise_bytes / 2 * np.arange(60)).tolist()).suspected for it in values)


def test_a_step_in_either_half_is_no_leak_and_neither_is_a_cycle() -> None:
    """Two caches are made, and garbage is collected every 30 jobs."""
    assert not trend_of([GIB] * 14 + [2 * GIB] * 30 + [3 * GIB] * 16).suspected
    assert not trend_of([GIB + job % 30 * MIB for job in range(60)]).suspected


def test_jobs_that_grow_by_kind_are_no_leak() -> None:
    """The order by weight goes from small plans to large."""
    kinds = [job // 12 for job in range(48)]
    values = [GIB + 500 * MIB * kind + random.Random(job).randrange(MIB) for job, kind in enumerate(kinds)]
    assert not trend_of(values, kinds).suspected
    assert trend_of(values).growth_bytes > 20 * MIB


def test_the_lowest_level_between_two_jobs_of_a_place_counts() -> None:
    levels = LeakDetector()
    for job in range(5):
        for place_bytes in (9 * GIB, job * MIB, 7 * GIB):
            levels.read({HOST: place_bytes + GIB, CARD: place_bytes})
        levels.finished(CARD, "a kind")
        levels.finished("a device without a meter", "a kind")
    host, card = levels.trends()
    assert [it.held_bytes for it in card.baselines] == [2 * MIB, 3 * MIB, 4 * MIB], (
        "of the first jobs, which warm up, none"
    )
    assert [it.held_bytes for it in host.baselines] == [GIB + 2 * MIB, GIB + 3 * MIB, GIB + 4 * MIB]
    assert (card.held_bytes, card.growth_bytes) == (4 * MIB, pytest.approx(MIB))
    assert not card.suspected


def collector_of(leak_bytes: int, jobs: int = 30) -> MetricsCollector:
    """One that has seen a batch whose every job left so much behind on the card."""

    def levels() -> Iterator[dict[str, int]]:
        for job in range(jobs):
            for working_bytes in (2 * GIB, random.Random(job).randrange(MIB)):
                yield {HOST: 3 * GIB, CARD: working_bytes + leak_bytes * job}

    each = levels()
    collector = MetricsCollector(held=lambda: next(each))
    for job in range(jobs):
        collector.on_span(Span(job=job, device=CARD, stage="sample", asked=0.0, begun=0.0, ended=1.0))
        collector.on_event(Event(kind=EventKind.DONE, job=job, device=CARD))
    return collector


def test_a_leak_is_named_with_its_place_its_size_and_what_to_do() -> None:
    (remark,) = collector_of(12 * MIB).figures().out_of_range()
    for part in ("memory leak on cuda:0", "12.0 MiB", "the last 28 jobs", "tensors", "Restart the process"):
        assert part in str(remark)
    assert collector_of(0).figures().out_of_range() == ()


def test_prometheus_has_it_by_place() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    text = collector_of(12 * MIB).figures().prometheus()
    samples = {
        (sample.name, sample.labels["place"]): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
        if "place" in sample.labels
    }
    assert samples["i2v_batch_leak_suspected", CARD] == 1
    assert samples["i2v_batch_leak_suspected", HOST] == 0
    assert samples["i2v_batch_held_growth_bytes_per_job", CARD] == pytest.approx(12 * MIB, rel=0.01)
    assert samples["i2v_batch_held_bytes", HOST] == 3 * GIB
    assert "held" not in MetricsCollector(held=dict).figures().prometheus()


def test_what_this_process_holds_is_read() -> None:
    before = held_now()[HOST]
    kept = torch.ones(32 * MIB)
    assert held_now()[HOST] - before == pytest.approx(kept.nbytes, rel=0.2)


@pytest.mark.gpu
def test_what_tensors_hold_of_a_card_is_read() -> None:
    torch.empty(1, device=CARD)
    before = held_now()[CARD]
    kept = torch.empty(32 * MIB, dtype=torch.uint8, device=CARD)
    assert held_now()[CARD] - before == kept.nbytes


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("leak_bytes", [0, 24 * MIB], ids=["as it is", "with a leak"])
def test_a_real_batch_is_suspected_only_where_it_leaks(
    tmp_path: Path, tiny_model: I2VModel, make_job: MakeJob, leak_bytes: int
) -> None:
    store, kept = JobStore(tmp_path / "jobs.queue"), list[torch.Tensor]()
    ids = store.add(make_job(seed) for seed in range(26))

    def on_event(event: Event) -> None:
        collector.on_event(event)
        if event.kind is EventKind.DONE and leak_bytes:
            kept.append(torch.ones(leak_bytes // 4))

    collector = MetricsCollector()
    engine = LocalEngine(
        store,
        [LocalDevice(torch_device=torch.device("cpu"))],
        EngineSettings(output=tmp_path / "out"),
        load=lambda _: tiny_model,
        on_event=on_event,
        on_span=collector.on_span,
    )
    engine.run()
    figures = collector.figures()
    assert store.counts()[JobState.DONE] == len(ids)
    store.close()
    (host,) = figures.held
    assert (host.place, host.suspected) == (HOST, bool(leak_bytes))
    assert any("memory leak" in str(it) for it in figures.out_of_range()) == bool(leak_bytes)
