"""Admission: a stage may start only when its predicted peak fits in what is free now.

`blocking_reason` decides it, a pure function; `AdmissionController` makes the stages of one device wait for it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count

from ...memory.device_memory import DeviceMemory
from ...planning.plan import Stage

_LAST_STAGE_FIRST = {Stage.DECODE: 0, Stage.SAMPLE: 1, Stage.ENCODE: 2}
_POLL_SECONDS = 0.2
"""Other programs do not say when they free memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRequest:
    """A stage that runs or waits to run."""

    job: int
    stage: Stage
    needed_bytes: int
    number: int
    """Ascending in the order in which requests came."""
    since: int = 0
    """Number of the newest request when this one was admitted; meaningless while it waits."""

    @property
    def rank(self) -> tuple[int, int]:
        """Ascending: the last stages of jobs first, so that started jobs get done."""
        return (_LAST_STAGE_FIRST[self.stage], self.number)


class BlockingCause(Enum):
    OTHER_PROGRAMS = "other programs hold too much"
    RUNNING_STAGES = "running stages hold too much"
    EARLIER_REQUEST = "a request of higher rank needs the memory first"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockingReason:
    """Why a stage may not start now."""

    cause: BlockingCause
    request: AdmissionRequest
    memory: DeviceMemory
    free_bytes: int
    """Usable bytes that no running stage holds."""
    waits_for: tuple[AdmissionRequest, ...] = ()
    """The running stages, or the request that goes first."""


def blocking_reason(
    request: AdmissionRequest,
    running: Sequence[AdmissionRequest],
    waiting: Sequence[AdmissionRequest],
    memory: DeviceMemory,
) -> BlockingReason | None:
    """Why a stage may not start now; None if it may.

    It may if it fits beside the running stages, and takes no memory from waiting requests of higher rank: each of them
    must fit beside it, and beside all that were admitted since that request came, once the others have ended.
    """
    usable_bytes = memory.usable_bytes
    free_bytes = max(0, usable_bytes - _needed_bytes(running))

    def blocked(cause: BlockingCause, *waits_for: AdmissionRequest) -> BlockingReason:
        return BlockingReason(cause=cause, request=request, memory=memory, free_bytes=free_bytes, waits_for=waits_for)

    if request.needed_bytes > usable_bytes:
        return blocked(BlockingCause.OTHER_PROGRAMS)
    if request.needed_bytes > free_bytes:
        return blocked(BlockingCause.RUNNING_STAGES, *running)
    for earlier in waiting:
        if earlier.rank < request.rank and earlier.needed_bytes <= usable_bytes:
            beside = [it for it in running if it.since >= earlier.number]
            if _needed_bytes([earlier, request, *beside]) > usable_bytes:
                return blocked(BlockingCause.EARLIER_REQUEST, earlier)
    return None


def _needed_bytes(requests: Sequence[AdmissionRequest]) -> int:
    return sum(it.needed_bytes for it in requests)


class NoRoomError(Exception):
    """Other programs hold the memory that a stage needs."""

    def __init__(self, reason: BlockingReason) -> None:
        super().__init__(reason)
        self.reason = reason
        self.room = reason.memory


class AdmissionController:
    """Lets stages of one device run together where their predicted peaks fit together.

        with controller.admitted(job_id, Stage.SAMPLE, needed_bytes, check_cancelled):
            ...  # the bytes are reserved

    Args:
        memory: reads the device's memory; called for each decision.
    """

    def __init__(self, memory: Callable[[], DeviceMemory]) -> None:
        self._memory = memory
        self._changed = threading.Condition()
        self._numbers = count(1)
        self._last_number = 0
        self._running: dict[int, AdmissionRequest] = {}
        self._waiting: dict[int, AdmissionRequest] = {}
        self._reasons: dict[int, BlockingReason] = {}
        self._not_alone: set[int] = set()

    @contextmanager
    def admitted(
        self, job: int, stage: Stage, needed_bytes: int, check_cancelled: Callable[[], None]
    ) -> Generator[None]:
        """Hold the stage's bytes while the context lasts; wait for them as long as it takes. See `admit`."""
        number = self.admit(job, stage, needed_bytes, check_cancelled)
        try:
            yield
        finally:
            self.leave(number)

    def admit(
        self,
        job: int,
        stage: Stage,
        needed_bytes: int,
        check_cancelled: Callable[[], None],
        memory_wait_seconds: float = math.inf,
    ) -> int:
        """Wait until the stage fits in what is free, and reserve its bytes until `leave` is called with the result.

        Args:
            check_cancelled: called while it waits; an exception of it ends the wait.
            memory_wait_seconds: how long to wait for other programs.

        Raises:
            NoRoomError: other programs have held the memory that it needs for so long.
        """
        with self._changed:
            number = self._last_number = next(self._numbers)
            request = AdmissionRequest(job=job, stage=stage, needed_bytes=needed_bytes, number=number)
            self._waiting[number] = request
        try:
            self._wait(request, check_cancelled, memory_wait_seconds)
        except BaseException:
            self._forget(number)
            raise
        return number

    def leave(self, number: int) -> bool:
        """End a stage's reservation; return whether no other stage ran at the same time."""
        is_alone = number not in self._not_alone
        self._forget(number)
        return is_alone

    def waits(self) -> tuple[BlockingReason, ...]:
        """Why each waiting stage waits."""
        with self._changed:
            return tuple(self._reasons.values())

    @property
    def reserved_bytes(self) -> int:
        with self._changed:
            return _needed_bytes(list(self._running.values()))

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not self._running

    def fits_now(self, needed_bytes: int) -> bool:
        """Whether so many bytes fit beside other programs, were no stage running."""
        return needed_bytes <= self._memory().usable_bytes

    def _forget(self, number: int) -> None:
        with self._changed:
            for table in (self._waiting, self._running, self._reasons):
                table.pop(number, None)
            self._not_alone.discard(number)
            self._changed.notify_all()

    def _wait(self, request: AdmissionRequest, check_cancelled: Callable[[], None], memory_wait_seconds: float) -> None:
        last_had_room = time.monotonic()
        while True:
            check_cancelled()
            with self._changed:
                running, waiting = tuple(self._running.values()), tuple(self._waiting.values())
                reason = blocking_reason(request, running, waiting, self._memory())
                if reason is None:
                    self._start(request)
                    return
                if reason.cause is not BlockingCause.OTHER_PROGRAMS:
                    last_had_room = time.monotonic()
                elif time.monotonic() - last_had_room > memory_wait_seconds:
                    raise NoRoomError(reason)
                self._reasons[request.number] = reason
                self._changed.wait(_POLL_SECONDS)

    def _start(self, request: AdmissionRequest) -> None:
        del self._waiting[request.number]
        self._reasons.pop(request.number, None)
        self._running[request.number] = replace(request, since=self._last_number)
        if len(self._running) > 1:
            self._not_alone.update(self._running)
        # The next request may fit beside this one.
        self._changed.notify_all()
