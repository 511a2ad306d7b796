"""Stages run together only where they fit together, none waits for ever, and each wait has its reason."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2v_core.batch.devices.admission import (
    AdmissionController,
    AdmissionRequest,
    BlockingCause,
    NoRoomError,
    blocking_reason,
)
from i2v_core.batch.devices.device import DeviceStatus
from i2v_core.batch.monitoring.messages import blocking_text, waiting_texts
from i2v_core.memory.device_memory import DeviceMemory
from i2v_core.planning.plan import Stage
from i2v_core.units import GIB


def request(job: int, stage: Stage, gib: float, number: int = 0, since: int = 0) -> AdmissionRequest:
    return AdmissionRequest(job=job, stage=stage, needed_bytes=int(gib * GIB), number=number or job, since=since)


ROOM = DeviceMemory(free_bytes=10 * GIB, others_bytes=2 * GIB, reserve_bytes=2 * GIB)


def test_room_is_what_is_left_by_others_and_the_reserve() -> None:
    assert ROOM.usable_bytes == 8 * GIB
    assert DeviceMemory(free_bytes=GIB, reserve_bytes=2 * GIB).usable_bytes == 0


def test_a_wait_has_its_reason_in_figures_and_in_words() -> None:
    sampling = request(1, Stage.SAMPLE, 6)
    assert blocking_reason(sampling, (), (), ROOM) is None
    assert blocking_reason(request(2, Stage.ENCODE, 2), (sampling,), (), ROOM) is None
    encoding = request(2, Stage.ENCODE, 3)
    reason = blocking_reason(encoding, (sampling,), (), ROOM)
    assert reason is not None
    assert (reason.cause, reason.request) == (BlockingCause.RUNNING_STAGES, encoding)
    assert (reason.waits_for, reason.free_bytes) == ((sampling,), 2 * GIB)
    ended = "encode of job 2 (3.00 GiB) waits for sample of job 1 (6.00 GiB) to end: 2.00 GiB are free"
    assert blocking_text(reason) == ended
    others = blocking_reason(request(2, Stage.SAMPLE, 9), (), (), ROOM)
    assert others is not None
    assert (others.cause, others.memory, others.waits_for) == (BlockingCause.OTHER_PROGRAMS, ROOM, ())
    assert "waits for other programs, which hold 2.00 GiB: 8.00 GiB are left" in blocking_text(others)
    status = DeviceStatus(name="a", room=ROOM, reserved_bytes=0, jobs=(), waits=(reason,), too_large_now=2)
    assert waiting_texts(status) == (
        ended,
        "2 waiting jobs do not fit beside other programs, which hold 2.00 GiB",
    )


def test_what_is_nearly_done_goes_first_and_the_small_may_pass_where_they_take_nothing_from_it() -> None:
    running = request(1, Stage.SAMPLE, 6)
    decoding = request(2, Stage.DECODE, 5)
    assert blocking_reason(decoding, (running,), (), ROOM) is not None
    assert blocking_reason(request(3, Stage.ENCODE, 2), (running,), (decoding,), ROOM) is None
    reason = blocking_reason(request(4, Stage.SAMPLE, 4, number=4), (), (decoding,), ROOM)
    assert reason is not None
    assert (reason.cause, reason.waits_for) == (BlockingCause.EARLIER_REQUEST, (decoding,))
    assert "lets decode of job 2 (5.00 GiB) go first" in blocking_text(reason)
    # What was admitted since counts: two small ones together would keep it waiting.
    passed = request(3, Stage.ENCODE, 2, since=3)
    assert blocking_reason(request(5, Stage.ENCODE, 1), (passed,), (decoding,), ROOM) is None
    assert blocking_reason(request(5, Stage.ENCODE, 2), (passed,), (decoding,), ROOM) is not None


def test_what_cannot_fit_at_all_now_keeps_nobody_waiting() -> None:
    huge = request(1, Stage.DECODE, 9)
    assert blocking_reason(request(2, Stage.ENCODE, 2), (), (huge,), ROOM) is None


requests = st.lists(
    st.builds(
        lambda job, stage, gib: (job, stage, gib),
        st.integers(1, 50),
        st.sampled_from(Stage),
        st.floats(0.1, 8),
    ),
    min_size=1,
    max_size=12,
)


@given(arrivals=requests, ends=st.randoms(use_true_random=False))
def test_all_get_in_and_never_more_than_fits(arrivals: list[tuple[int, Stage, float]], ends: object) -> None:
    """Requests come and end at random; whatever the order, the sum stays within and each has its turn."""
    assert isinstance(ends, random.Random)
    waiting = [request(job, stage, gib, number=index + 1) for index, (job, stage, gib) in enumerate(arrivals)]
    running: list[AdmissionRequest] = []
    for _ in range(4 * len(arrivals)):
        for asks in sorted(waiting, key=lambda _: ends.random()):
            if blocking_reason(asks, running, waiting, ROOM) is None:
                waiting.remove(asks)
                running.append(request(asks.job, asks.stage, asks.needed_bytes / GIB, asks.number, since=99))
        assert sum(it.needed_bytes for it in running) <= ROOM.usable_bytes
        if running:
            running.remove(ends.choice(running))
    assert not waiting


def test_threads_are_let_in_as_room_comes() -> None:
    """Ten stages of 3 GiB on 8: two at a time, all in the end."""
    controller = AdmissionController(lambda: ROOM)
    lock, together, most = threading.Lock(), 0, 0
    both = threading.Barrier(2, timeout=20)

    def work(job: int) -> None:
        nonlocal together, most
        with controller.admitted(job, Stage.SAMPLE, 3 * GIB, lambda: None):
            with lock:
                together += 1
                most = max(most, together)
            assert controller.reserved_bytes <= ROOM.usable_bytes
            both.wait()  # which only two that are in together pass
            with lock:
                together -= 1

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(work, range(10)))
    assert most == 2
    assert controller.is_idle
    assert not controller.waits()


def test_a_wait_ends_when_other_programs_free_memory_or_it_is_cancelled() -> None:
    free = threading.Event()
    controller = AdmissionController(lambda: DeviceMemory(free_bytes=(8 if free.is_set() else 2) * GIB))

    class CancelError(Exception):
        pass

    def cancel() -> None:
        if controller.waits():
            raise CancelError

    with pytest.raises(CancelError), controller.admitted(1, Stage.SAMPLE, 4 * GIB, cancel):
        pass
    assert not controller.waits()

    def freed_while_it_waits() -> None:
        if controller.waits():
            free.set()

    with controller.admitted(1, Stage.SAMPLE, 4 * GIB, freed_while_it_waits):
        assert free.is_set()
        assert controller.reserved_bytes == 4 * GIB
    assert controller.reserved_bytes == 0


def test_a_wait_for_other_programs_ends_with_its_reason() -> None:
    full = DeviceMemory(free_bytes=GIB, others_bytes=3 * GIB)
    controller = AdmissionController(lambda: full)
    with pytest.raises(NoRoomError) as failure:
        controller.admit(1, Stage.SAMPLE, 2 * GIB, lambda: None, memory_wait_seconds=0.0)
    assert failure.value.reason.cause is BlockingCause.OTHER_PROGRAMS
    assert failure.value.room == full
    assert controller.is_idle
    assert not controller.waits()
