"""The results of a denoiser's calls on disk, from which a run that was cut short gets its first calls answered.

A denoiser call is a function of its inputs. So a sampler that starts again, with the same noise, asks the same calls in
the same order, and ends with the same bits, whatever state it keeps between them. A call is known by a hash of its
inputs: one that differs in anything is not found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..units import GIB
from .record_file import Record, found_or_set_aside, read_facts, read_record, save_record, surplus

logger = logging.getLogger(__name__)

CALLS_LIMIT_BYTES = 4 * GIB
"""Disk that the calls of all runs may take."""
RESULTS_LIMIT_BYTES = GIB
"""Disk that the results of finished runs may take."""
_MAX_RUNS = 16
_CALL, _RESULT = ".call.safetensors", ".result.safetensors"
_PART, _BROKEN = "*.part", "*.broken"
"""Files of a write that was cut short, and files that were set aside."""


class CallRecord:
    """The calls of one run: a folder, with a file for each.

    Problems with the disk are logged and returned once; after one, nothing more is written.

    Example:
        record = CallRecord(folder, "key of the run")
        if (found := record.find("hash of the inputs")) is None:
            record.add("hash of the inputs", Record({"output": model(inputs)}))
            problem = record.write()
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / key
        self._key = key
        self._stored = self._files()
        self._pending: dict[str, Record] = {}
        self._size_bytes = sum(self._stored.values())
        self._closed = False

    def __bool__(self) -> bool:
        """Return whether calls are on disk."""
        return bool(self._stored)

    @property
    def size_bytes(self) -> int:
        """Bytes of the calls, those that wait to be written included."""
        return self._size_bytes

    def find(self, call: str) -> Record | None:
        """Return what a call returned, if that is on disk. A damaged or foreign file is set aside."""
        if call not in self._stored:
            return None
        path = self._path(call)
        return found_or_set_aside(path, partial(read_record, path, self._key_of(call)))

    def add(self, call: str, record: Record) -> str | None:
        """Keep a call until it is written; return the problem, in words, if the limit is reached."""
        if self._closed:
            return None
        if self._size_bytes + record.size_bytes > CALLS_LIMIT_BYTES:
            self._closed = True
            return f"the calls in {self.folder} have reached the limit of {CALLS_LIMIT_BYTES // GIB} GiB"
        self._pending[call] = record
        self._size_bytes += record.size_bytes
        return None

    def write(self) -> str | None:
        """Write what was added; return the problem, in words, if it could not be written."""
        pending, self._pending = self._pending, {}
        for call, record in pending.items():
            problem = save_record(self._path(call), self._key_of(call), record)
            if problem is not None:
                self._closed = True
                return problem
            self._stored[call] = record.size_bytes
        self._prune()
        return None

    def delete(self) -> None:
        """Delete the calls of a finished run, and what waits to be written."""
        self._pending, self._stored = {}, {}
        _delete(self.folder)

    def _files(self) -> dict[str, int]:
        with suppress(OSError):
            return {it.name.removesuffix(_CALL): it.stat().st_size for it in self.folder.glob(f"*{_CALL}")}
        return {}

    def _path(self, call: str) -> Path:
        return self.folder / f"{call}{_CALL}"

    def _key_of(self, call: str) -> str:
        return f"{self._key} {call}"

    def _prune(self) -> None:
        """Delete runs that were abandoned: the oldest beyond a number and a total size."""
        try:
            others = [it for it in self.folder.parent.iterdir() if it.is_dir() and it != self.folder]
            most_bytes = CALLS_LIMIT_BYTES - self._size_bytes
            for folder in list(surplus(others, most=_MAX_RUNS - 1, most_bytes=most_bytes)):
                _delete(folder, _BROKEN)
        except OSError as error:
            logger.warning("old calls in %s cannot be removed: %s", self.folder.parent, error)


class RunResults:
    """The results of finished runs of a sampler, each kept until the video that it belongs to is done."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, key: str) -> Record | None:
        """Return a run's result. A damaged or foreign file is set aside."""
        path = self._path(key)
        return found_or_set_aside(path, partial(read_record, path, key))

    def save(self, key: str, record: Record) -> str | None:
        """Write a result; return the problem, in words, if it could not be written."""
        problem = save_record(self._path(key), key, record)
        if problem is None:
            files = _matching(self._folder, f"*{_RESULT}", _PART, _BROKEN)
            self._remove(surplus(files, most=_MAX_RUNS, most_bytes=RESULTS_LIMIT_BYTES))
        return problem

    def forget(self, is_whole: Callable[[str], bool]) -> None:
        """Delete the results of videos that are done, by the name under `video` in their facts."""

        def is_done(path: Path) -> bool:
            facts = found_or_set_aside(path, partial(read_facts, path))
            return facts is not None and is_whole(str(facts.get("video")))

        self._remove(filter(is_done, _matching(self._folder, f"*{_RESULT}")))

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_RESULT}"

    def _remove(self, paths: Iterable[Path]) -> None:
        try:
            for path in list(paths):
                path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("old results in %s cannot be removed: %s", self._folder, error)


def _matching(folder: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]


def _delete(folder: Path, *others: str) -> None:
    """Delete a folder of calls; files that match no pattern, or were set aside, stay with it."""
    try:
        for path in _matching(folder, f"*{_CALL}", _PART, *others):
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the calls in %s cannot be removed: %s", folder, error)
    with suppress(OSError):  # it is not there, or not empty
        folder.rmdir()
