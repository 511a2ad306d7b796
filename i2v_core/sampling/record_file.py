"""Tensors on disk under a key: files that are written whole or not at all, and checked when they are read."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import FileError
from ..files import atomic_file, file_errors, set_aside
from .digest import digest

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

_VERSION, _HEADER = 1, "i2v_checkpoint"
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError)


@dataclass(frozen=True, slots=True)
class Record:
    """Tensors, and facts about them in JSON's types."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def size_bytes(self) -> int:
        return sum(it.nbytes for it in self.tensors.values())


def save_record(path: Path, key: str, record: Record) -> str | None:
    """Write a record, whole or not at all; return the problem, in words, if it could not be written."""
    try:
        # Cloned, because two of them may share memory, which safetensors refuses to store.
        contents = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in record.tensors.items()}
        header = {**record.facts, "version": _VERSION, "key": key, "contents": digest(contents)}
        content = safetensors.torch.save(contents, {_HEADER: json.dumps(header)})
        with atomic_file(path) as temporary, file_errors(path):
            temporary.write_bytes(content)
    except FileError as error:
        logger.warning("%s", error)
        return str(error)
    return None


def read_record(path: Path, key: str) -> Record:
    """Read a record; raises one of `_UNUSABLE` for what is damaged, or was saved under another key."""
    header = read_facts(path)
    if header["version"] != _VERSION or header["key"] != key:
        raise ValueError("it belongs to another video or version")
    tensors = safetensors.torch.load(path.read_bytes())
    if header["contents"] != digest(tensors):
        raise ValueError("its contents are not those that were written")
    return Record(tensors, header)


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a record alone."""
    opened: Any = safetensors.safe_open(path, framework="pt")
    with opened as file:
        metadata = cast("dict[str, str]", file.metadata() or {})
    return cast("dict[str, Any]", json.loads(metadata[_HEADER]))


def found_or_set_aside(path: Path, read: Callable[[], Found]) -> Found | None:
    """Return what `read` makes of a file, or None; a file that cannot be used is set aside."""
    if not path.is_file():
        return None
    try:
        return read()
    except _UNUSABLE as error:
        logger.warning("the checkpoint in %s cannot be used and is set aside: %s", path, error)
        set_aside(path)
        return None


def surplus(paths: Sequence[Path], *, most: int, most_bytes: float = math.inf) -> Iterator[Path]:
    """Yield the oldest files, or folders of files, that are beyond a number or a total size."""
    total_bytes = 0
    newest_first = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    for index, path in enumerate(newest_first):
        total_bytes += sum(it.stat().st_size for it in (path.iterdir() if path.is_dir() else (path,)))
        if index >= most or total_bytes > most_bytes:
            yield path
