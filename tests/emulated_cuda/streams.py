"""Streams and events with CUDA's ordering rules, which detect races.

Work runs at once, in program order; a race is where a real card would have been free to run it in another order. Each
piece of work has a number, and a vector clock (Fidge 1988, Mattern 1989) holds for each stream the number up to which
its work is known to have ended.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

HOST = 0
"""Stream number of the host's work."""


class Clock(dict[int, int]):
    """Vector clock: by stream, the number of its last work that has ended."""

    def merge(self, other: Clock) -> None:
        for stream, number in other.items():
            self[stream] = max(number, self.get(stream, 0))


class Stream:
    """Emulates `torch.cuda.Stream`. `clock` holds the work that has ended before the stream's next work starts."""

    def __init__(self, streams: Streams, number: int) -> None:
        self.number, self.clock = number, Clock()
        self._streams = streams

    def wait_stream(self, other: Stream) -> None:
        self.clock.merge(other.clock)

    def wait_event(self, event: Event) -> None:
        self.clock.merge(event.clock)

    def record_event(self) -> Event:
        return Event(self._streams, Clock(self.clock))

    def synchronize(self) -> None:
        self._streams.host_waits_for(self.clock)


@dataclass(frozen=True)
class Event:
    """Emulates `torch.cuda.Event`."""

    streams: Streams
    clock: Clock

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.streams.current).wait_event(self)

    def synchronize(self) -> None:
        self.streams.host_waits_for(self.clock)


@dataclass(frozen=True)
class _Access:
    stream: int
    number: int
    work: str


@dataclass
class _Memory:
    owner: Stream
    write: _Access | None = None
    reads: dict[int, _Access] = field(default_factory=dict[int, _Access])

    @property
    def accesses(self) -> list[_Access]:
        return [*self.reads.values(), *([self.write] if self.write else [])]


class Streams:
    """All streams of a card.

    `races` describes memory accesses that nothing orders; `waits` counts how often the host waited for the card.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.waits = 0
        self._stream_numbers, self._work_numbers = count(HOST + 1), count(1)
        self._host_clock = Clock()
        self._memory: dict[int, _Memory] = {}
        self.default = self.current = self.new()

    def new(self, *_: Any) -> Stream:
        return Stream(self, next(self._stream_numbers))

    @contextmanager
    def use(self, stream: Stream) -> Generator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def host_waits_for(self, clock: Clock) -> None:
        self.waits += 1
        self._host_clock.merge(clock)

    def allocated(self, memory: int) -> None:
        """Track new memory of the card, or new pinned memory; it belongs to the current stream."""
        self._memory[memory] = _Memory(self.current)

    def freed(self, memory: int) -> None:
        """Check freed memory: the allocator reuses it for its stream's next work, whatever other streams still do with
        it.
        """
        gone = self._memory.pop(memory)
        for access in gone.accesses:
            if access.stream not in (HOST, gone.owner.number):
                self._check(access, gone.owner.clock, "it is freed")

    def on_card(self, work: str, reads: set[int], writes: set[int], *, blocking: bool) -> None:
        """Record work of the current stream, which starts after all that the host has done or waited for."""
        stream = self.current
        number = next(self._work_numbers)
        seen = Clock(stream.clock)
        seen.merge(self._host_clock)
        stream.clock[stream.number] = number
        self._access(_Access(stream.number, number, work), seen, reads, writes)
        if blocking:
            stream.synchronize()

    def on_host(self, work: str, reads: set[int], writes: set[int]) -> None:
        number = next(self._work_numbers)
        self._access(_Access(HOST, number, work), self._host_clock, reads, writes)
        self._host_clock[HOST] = number

    def _access(self, access: _Access, seen: Clock, reads: set[int], writes: set[int]) -> None:
        for memory in (self._memory[key] for key in reads if key in self._memory):
            if memory.write is not None:
                self._check(memory.write, seen, access.work)
            memory.reads[access.stream] = access
        for memory in (self._memory[key] for key in writes if key in self._memory):
            for before in memory.accesses:
                self._check(before, seen, access.work)
            memory.write, memory.reads = access, {}

    def _check(self, before: _Access, seen: Clock, what: str) -> None:
        if before.number > max(seen.get(before.stream, 0), self._host_clock.get(before.stream, 0)):
            where = "".join(traceback.format_stack(limit=12)[:-3])
            self.races.append(f"{what} does not wait for {before.work} of stream {before.stream}\n{where}")
