"""Where the stages of one device ask to be let in, from their threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

from ..planning.plan import Stage
from .admission import Request, Room, what_it_waits_for

_LOOK_AGAIN_SECONDS = 0.2
"""Other programs do not say when they free memory."""


class NoRoomError(Exception):
    """Other programs hold what a stage needs."""

    def __init__(self, words: str, room: Room) -> None:
        super().__init__(words)
        self.room = room


class AdmissionDesk:
    """Lets stages run together where their predicted peaks fit together. `room` is asked each time."""

    def __init__(self, room: Callable[[], Room]) -> None:
        self._room = room
        self._changed = threading.Condition()
        self._numbers = count(1)
        self._last_number = 0
        self._running: dict[int, Request] = {}
        self._waiting: dict[int, Request] = {}
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
        patience_seconds: float = math.inf,
    ) -> int:
        """Waits until the stage fits in what is free; its bytes are held until `leave` is told the number returned.

        Args:
            check_cancelled: called while it waits; what that raises ends the wait.
            patience_seconds: how long to wait for other programs.

        Raises:
            NoRoomError: other programs have held for so long what it needs.
        """
        with self._changed:
            number = self._last_number = next(self._numbers)
            request = Request(job=job, stage=stage, needed_bytes=needed_bytes, number=number)
            self._waiting[number] = request
        try:
            self._wait(request, check_cancelled, patience_seconds)
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
        return needed_bytes <= self._room().ours_bytes

    def _forget(self, number: int) -> None:
        with self._changed:
            for table in (self._waiting, self._running, self._words):
                table.pop(number, None)
            self._in_company.discard(number)
            self._changed.notify_all()

    def _wait(self, request: Request, check_cancelled: Callable[[], None], patience_seconds: float) -> None:
        had_room = time.monotonic()
        while True:
            check_cancelled()
            with self._changed:
                room = self._room()
                words = what_it_waits_for(request, tuple(self._running.values()), tuple(self._waiting.values()), room)
                if words is None:
                    del self._waiting[request.number]
                    self._words.pop(request.number, None)
                    self._running[request.number] = replace(request, since=self._last_number)
                    if len(self._running) > 1:
                        self._in_company.update(self._running)
                    # The next in line may fit beside this one.
                    self._changed.notify_all()
                    return
                if request.needed_bytes <= room.ours_bytes:
                    had_room = time.monotonic()
                elif time.monotonic() - had_room > patience_seconds:
                    raise NoRoomError(words, room)
                self._words[request.number] = words
                self._changed.wait(_LOOK_AGAIN_SECONDS)
