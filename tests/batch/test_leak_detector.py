"""A batch that keeps memory from job to job is suspected, and no other: not for noise, a step, or larger jobs."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from i2v_core.batch.devices.device import LocalDevice
from i2v_core.batch.engines.local import Engine
from i2v_core.batch.engines.settings import EngineSettings
from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.store import JobStore
from i2v_core.batch.monitoring.events import Event, EventKind, Span
from i2v_core.batch.monitoring.leak_detector import HOST, Baseline, LeakDetector, MemoryTrend, held_now, trend
from i2v_core.batch.monitoring.metrics import MetricsCollector
from i2v_core.families import I2VModel
from i2v_core.units import GIB, MIB

from .conftest import MakeJob

CARD = "cuda:0"


def trend_of(held_bytes: Sequence[float], kinds: Sequence[Hashable] | None = None) -> MemoryTrend:
    names = kinds or [None] * len(held_bytes)
    pairs = enumerate(zip(held_bytes, names, strict=True))
    return trend(CARD, tuple(Baseline(job=job, kind=kind, held_bytes=round(held)) for job, (held, kind) in pairs))


@given(
    leak=st.integers(5 * MIB, GIB),
    noise=st.lists(st.floats(0, 1), min_size=16, max_size=60),
    start=st.integers(0, 64 * GIB),
    kinds=st.integers(1, 3),
)
def test_what_grows_with_each_job_is_suspected(leak: int, noise: list[float], start: int, kinds: int) -> None:
    """Whatever noise comes on top, of half a leaked job: in a list of up to three kinds of jobs too."""
    found = trend_of(
        [start + leak * (job + share / 2) for job, share in enumerate(noise)],
        [f"kind {job % kinds}" for job in range(len(noise))],
    )
    assert found.suspected
    assert abs(found.growth_bytes - leak) <= leak / 2 + 1


@given(held=st.lists(st.integers(0, 8 * GIB), min_size=1, max_size=60), more=st.integers(0, 64 * GIB))
def test_a_level_counts_by_its_changes_alone(held: list[int], more: int) -> None:
    plain, raised = trend_of(held), trend_of([it + more for it in held])
    assert (plain.suspected, plain.growth_bytes) == (raised.suspected, pytest.approx(raised.growth_bytes))


@given(held=st.lists(st.integers(0, 8 * GIB), min_size=1, max_size=60))
def test_what_never_grows_is_not_suspected(held: list[int]) -> None:
    assert not trend_of(sorted(held, reverse=True)).suspected


@given(before=st.integers(0, 30), after=st.integers(0, 30), step=st.integers(0, 64 * GIB))
def test_a_step_is_not_suspected(before: int, after: int, step: int) -> None:
    """Such as when a job first needs another precision: it stays, and does not grow."""
    assert not trend_of([GIB] * (before + 1) + [GIB + step] * after).suspected


@pytest.mark.parametrize("noise_bytes", [20 * MIB, GIB])
def test_noise_is_not_suspected_and_the_same_with_a_leak_is(noise_bytes: int) -> None:
    suspected = {0: 0, noise_bytes // 4: 0}
    for leak in suspected:
        for seed in range(200):
            values = np.random.default_rng(seed).normal(8 * GIB, noise_bytes, 60)
            suspected[leak] += trend_of((values + leak * np.arange(60)).tolist()).suspected
    assert list(suspected.values()) == [pytest.approx(0, abs=1), 200]


def test_jobs_that_grow_by_kind_are_no_leak() -> None:
    """The order by weight goes from small plans to large."""
    kinds = [job // 12 for job in range(48)]
    values = [GIB + 500 * MIB * kind + random.Random(job).randrange(MIB) for job, kind in enumerate(kinds)]
    assert not trend_of(values, kinds).suspected
    assert trend_of(values).growth_bytes > 20 * MIB


def test_the_lowest_level_between_two_jobs_of_a_place_counts() -> None:
    levels = LeakDetector()
    for job in range(4):
        for place_bytes in (9 * GIB, job * MIB, 7 * GIB):
            levels.read({HOST: place_bytes + GIB, CARD: place_bytes})
        levels.finished(CARD, "a kind")
        levels.finished("a device without a meter", "a kind")
    host, card = levels.trends()
    assert [it.held_bytes for it in card.floors] == [2 * MIB, 3 * MIB], "of the first jobs, which warm up, none"
    assert [it.held_bytes for it in host.floors] == [GIB + 2 * MIB, GIB + 3 * MIB]
    assert (card.held_bytes, card.growth_bytes) == (3 * MIB, MIB)
    assert not card.suspected


def watched(leak_bytes: int, jobs: int = 30) -> MetricsCollector:
    """One that has seen a batch whose every job left so much behind on the card."""

    def levels() -> Iterator[dict[str, int]]:
        for job in range(jobs):
            for working_bytes in (2 * GIB, random.Random(job).randrange(MIB)):
                yield {HOST: 3 * GIB, CARD: working_bytes + leak_bytes * job}

    each = levels()
    watch = MetricsCollector(held=lambda: next(each))
    for job in range(jobs):
        watch.on_span(Span(job=job, device=CARD, stage="sample", asked=0.0, begun=0.0, ended=1.0))
        watch.on_event(Event(kind=EventKind.DONE, job=job, device=CARD))
    return watch


def test_a_leak_is_named_with_its_place_its_size_and_what_to_do() -> None:
    (remark,) = watched(12 * MIB).figures().out_of_range()
    for part in ("memory of cuda:0", "12.0 MiB", "of the last 28", "tensors", "start the process anew"):
        assert part in str(remark)
    assert watched(0).figures().out_of_range() == ()


def test_prometheus_has_it_by_place() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    text = watched(12 * MIB).figures().prometheus()
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
    ids = store.add(make_job(seed) for seed in range(20))

    def hear(event: Event) -> None:
        watch.on_event(event)
        if event.kind is EventKind.DONE and leak_bytes:
            kept.append(torch.ones(leak_bytes // 4))

    watch = MetricsCollector()
    engine = Engine(
        store,
        [LocalDevice(torch_device=torch.device("cpu"))],
        EngineSettings(output=tmp_path / "out"),
        load=lambda _: tiny_model,
        on_event=hear,
        on_span=watch.on_span,
    )
    engine.run()
    figures = watch.figures()
    assert store.counts()[JobState.DONE] == len(ids)
    store.close()
    (host,) = figures.held
    assert (host.place, host.suspected) == (HOST, bool(leak_bytes))
    assert any("is not given back" in str(it) for it in figures.out_of_range()) == bool(leak_bytes)
