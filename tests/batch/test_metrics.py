"""Figures of a batch: summed up, named where they are out of range, and in Prometheus' own format."""

from __future__ import annotations

from dataclasses import replace

import pytest

from i2v_core.batch.devices.device import DeviceStatus
from i2v_core.batch.monitoring import metrics as watch
from i2v_core.batch.monitoring.events import Event, EventKind, Span
from i2v_core.batch.monitoring.metrics import BatchMetrics, CardReading, MetricsCollector, read_cards
from i2v_core.memory.device_memory import DeviceMemory
from i2v_core.units import GIB

from .conftest import Clock

HEALTHY = BatchMetrics(
    seconds=600.0,
    done=10,
    failed=1,
    retries=2,
    devices_lost=0,
    waiting_share=0.05,
    reserved_share=0.5,
    occupancy=0.8,
    utilisation=0.9,
)


def test_events_and_spans_are_summed_up() -> None:
    clock = Clock()
    watched = MetricsCollector(clock)
    for kind in (EventKind.STARTED, EventKind.DONE, EventKind.DONE, EventKind.FAILED, EventKind.RETRY):
        watched.on_event(Event(kind=kind, job=1, device="a"))
    watched.on_span(Span(job=1, device="a", stage="sample", asked=0.0, begun=1.0, ended=4.0))
    clock.now += 1800
    status = DeviceStatus(name="a", room=DeviceMemory(free_bytes=8 * GIB), reserved_bytes=2 * GIB, jobs=(1,), waits=())
    watched.sample({0: CardReading(occupancy=0.5, utilisation=0.9), 1: CardReading(occupancy=0.95, utilisation=0.2)})
    watched.sample({0: CardReading(occupancy=0.6, utilisation=0.9), 1: CardReading(occupancy=0.5, utilisation=0.6)})
    figures = watched.figures((status,))
    assert (figures.done, figures.failed, figures.retries, figures.jobs_an_hour) == (2, 1, 1, 4.0)
    assert (figures.waiting_share, figures.reserved_share) == (0.25, 0.25)
    assert (figures.occupancy, figures.utilisation) == (0.95, pytest.approx(0.4))
    assert MetricsCollector(clock).figures().occupancy is None


def test_what_is_out_of_range_is_named_with_its_likely_cause() -> None:
    assert HEALTHY.out_of_range() == ()
    assert "95% of device memory" in str(replace(HEALTHY, occupancy=0.95).out_of_range()[0])
    assert "busy 30% of the time" in str(replace(HEALTHY, utilisation=0.3).out_of_range()[0])
    assert "wait for device memory 40%" in str(replace(HEALTHY, waiting_share=0.4).out_of_range()[0])
    assert "20 jobs failed" in str(replace(HEALTHY, failed=20).out_of_range()[0])
    assert replace(HEALTHY, utilisation=0.3, waiting_share=0.4, seconds=5.0).out_of_range() == ()
    assert replace(HEALTHY, utilisation=None, occupancy=None).out_of_range() == ()


def test_prometheus_reads_it() -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    families = {family.name: family for family in parser.text_string_to_metric_families(HEALTHY.prometheus())}
    values = {name: family.samples[0].value for name, family in families.items()}
    assert values["i2v_batch_jobs_done"] == 10
    assert values["i2v_batch_jobs_per_hour"] == 60.0
    assert values["i2v_batch_vram_occupancy"] == 0.8
    assert families["i2v_batch_retries"].type == "counter"
    assert "vram" not in replace(HEALTHY, occupancy=None).prometheus()


def test_without_cards_or_their_library_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (reading for card in read_cards().values() for reading in (card.occupancy, card.utilisation)):
        assert 0 <= share <= 1
    monkeypatch.setattr(watch, "find_spec", lambda _: None)
    assert read_cards() == {}
