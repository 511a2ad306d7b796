"""Whether a stage may start: only when its predicted peak fits in what is free now. Pure functions."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count

from ...memory.device_memory import DeviceMemory
from ...planning.plan import Stage
from ...units import format_gib

_LAST_STAGE_FIRST = {Stage.DECODE: 0, Stage.SAMPLE: 1, Stage.ENCODE: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionRequest:
    """A stage that runs or wants to. `number` counts requests in the order in which they came; `since` is the number of
    the last that had come when this one was let in (of one that waits it says nothing).
    """

    job: int
    stage: Stage
    needed_bytes: int
    number: int
    since: int = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Ascending: jobs that are nearly done first, so that what is begun gets done."""
        return (_LAST_STAGE_FIRST[self.stage], self.number)

    def __str__(self) -> str:
        return f"{self.stage.value} of job {self.job} ({format_gib(self.needed_bytes)})"


def blocking_reason(
    request: AdmissionRequest,
    running: Sequence[AdmissionRequest],
    waiting: Sequence[AdmissionRequest],
    room: DeviceMemory,
) -> str | None:
    """In words; None where the stage may start now.

    It may if it fits beside what runs, and takes no room from those that wait before it: each of them must fit beside
    it, and beside all that were let in since it came, once the others have ended.
    """
    free_bytes = room.usable_bytes - sum(it.needed_bytes for it in running)
    if request.needed_bytes > room.usable_bytes:
        return (
            f"{request} waits for other programs, which hold {format_gib(room.others_bytes)}: "
            f"{format_gib(room.usable_bytes)} are left"
        )
    if request.needed_bytes > free_bytes:
        return (
            f"{request} waits for {' and '.join(map(str, running))} to end: {format_gib(max(free_bytes, 0))} are free"
        )
    for before in waiting:
        if before.rank < request.rank and before.needed_bytes <= room.usable_bytes:
            beside = [it for it in running if it.since >= before.number]
            if before.needed_bytes + request.needed_bytes + sum(it.needed_bytes for it in beside) > room.usable_bytes:
                return f"{request} lets {before} go first"
    return None


_LOOK_AGAIN_SECONDS = 0.2
"""Other programs do not say when they free memory."""


class NoRoomError(Exception):
    """Other programs hold what a stage needs."""

    def __init__(self, words: str, room: DeviceMemory) -> None:
        super().__init__(words)
        self.room = room


class AdmissionController:
    """Lets stages run together where their predicted peaks fit together. `room` is asked each time."""

    def __init__(self, room: Callable[[], DeviceMemory]) -> None:
        self._room = room
        self._changed = threading.Condition()
        self._numbers = count(1)
        self._last_number = 0
        self._running: dict[int, AdmissionRequest] = {}
        self._waiting: dict[int, AdmissionRequest] = {}
        self._words: dict[int, str] = {}
        self._in_company: set[int] = set()

    @contextmanager
    def admitted(
        self, job: int, stage: Stage, needed_bytes: int, check_cancelled: Callable[[], None]
    ) -> Generator[None]:
        """As `admit`, for as long as the context lasts, and with all the patience there is."""
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
        """Waits until the stage fits in what is free; its bytes are held until `leave` is told the number returned.

        Args:
            check_cancelled: called while it waits; what that raises ends the wait.
            memory_wait_seconds: how long to wait for other programs.

        Raises:
            NoRoomError: other programs have held for so long what it needs.
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
        """The stage has ended; whether no other ran at the same time."""
        alone = number not in self._in_company
        self._forget(number)
        return alone

    def waits(self) -> tuple[str, ...]:
        """What each stage that waits is waiting for."""
        with self._changed:
            return tuple(self._words.values())

    @property
    def reserved_bytes(self) -> int:
        with self._changed:
            return sum(it.needed_bytes for it in self._running.values())

    @property
    def is_idle(self) -> bool:
        with self._changed:
            return not self._running

    def fits_now(self, needed_bytes: int) -> bool:
        """Whether so much could ever be let in while other programs hold what they do."""
        return needed_bytes <= self._room().usable_bytes

    def _forget(self, number: int) -> None:
        with self._changed:
            for table in (self._waiting, self._running, self._words):
                table.pop(number, None)
            self._in_company.discard(number)
            self._changed.notify_all()

    def _wait(self, request: AdmissionRequest, check_cancelled: Callable[[], None], memory_wait_seconds: float) -> None:
        had_room = time.monotonic()
        while True:
            check_cancelled()
            with self._changed:
                room = self._room()
                words = blocking_reason(request, tuple(self._running.values()), tuple(self._waiting.values()), room)
                if words is None:
                    del self._waiting[request.number]
                    self._words.pop(request.number, None)
                    self._running[request.number] = replace(request, since=self._last_number)
                    if len(self._running) > 1:
                        self._in_company.update(self._running)
                    # The next in line may fit beside this one.
                    self._changed.notify_all()
                    return
                if request.needed_bytes <= room.usable_bytes:
                    had_room = time.monotonic()
                elif time.monotonic() - had_room > memory_wait_seconds:
                    raise NoRoomError(words, room)
                self._words[request.number] = words
                self._changed.wait(_LOOK_AGAIN_SECONDS)
