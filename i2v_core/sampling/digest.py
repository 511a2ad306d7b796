"""Hashes of nested values: equal for equal values in any process, so that work on disk is found again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum)
_SAMPLE_VALUES = 32


def digest(value: object, *, sampled: bool = False, object_levels: int = 0) -> str:
    """Return a hash of plain values, tensors, and containers of them.

    Functions, modules and other objects count by their names, since their contents may change as they run.

    Args:
        value: anything.
        sampled: hash a few values of each tensor, with its shape and dtype, in place of all.
        object_levels: look into closures and attributes of objects, and of objects in these, so many levels deep.
    """
    hasher = _Hasher(sampled=sampled)
    hasher.add(value, object_levels)
    return hasher.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as they lie in memory, row by row."""
    values = tensor.detach().cpu().reshape(-1)
    if values.stride(0) != 1:  # a single one may have any stride, which no view as bytes takes
        values = values.clone(memory_format=torch.contiguous_format)
    contents: Any = values.view(torch.uint8).numpy()
    return memoryview(contents)


@dataclass(slots=True, kw_only=True)
class _Hasher:
    sampled: bool
    _sha256: Any = field(default_factory=hashlib.sha256)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()[:32]

    def add(self, value: object, levels: int) -> None:
        if isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, _PLAIN):
            self._add_text(repr(value))
        elif isinstance(value, Mapping):
            self._add_mapping(cast("Mapping[Any, Any]", value), levels)
        elif isinstance(value, (list, tuple)):
            items = cast("list[Any] | tuple[Any, ...]", value)
            self._add_text(f"sequence of {len(items)}")
            for item in items:
                self.add(item, levels)
        elif isinstance(value, (set, frozenset)):
            items = cast("set[Any] | frozenset[Any]", value)
            if all(isinstance(it, _PLAIN) for it in items):
                self.add(sorted(map(repr, items)), levels)
            else:
                self.add(sorted(digest(it, sampled=self.sampled, object_levels=levels) for it in items), levels)
        else:
            self._add_object(value, levels)

    def _add_text(self, text: str) -> None:
        content = text.encode("utf-8", "surrogatepass")
        self._sha256.update(b"%d:" % len(content))  # the length keeps neighbours apart
        self._sha256.update(content)

    def _add_mapping(self, value: Mapping[Any, Any], levels: int) -> None:
        named = sorted(((_key(key), it) for key, it in value.items()), key=lambda pair: pair[0])
        self._add_text(f"mapping of {len(named)}")
        for name, it in named:
            self._add_text(name)
            self.add(it, levels)

    def _add_tensor(self, tensor: Tensor) -> None:
        stored = _stored(tensor)
        self._add_text(f"{stored.dtype} {tuple(stored.shape)}")
        if not stored.is_meta:
            self._sha256.update(tensor_bytes(_sample(stored) if self.sampled else stored))

    def _add_object(self, value: object, levels: int) -> None:
        if isinstance(value, MethodType):
            self._add_object(value.__func__, 0)
            self.add(value.__self__, levels)
            return
        if isinstance(value, partial):
            self.add([value.func, value.args, value.keywords], levels)
            return
        named = value if isinstance(value, (FunctionType, BuiltinFunctionType, type)) else type(value)
        self._add_text(f"{named.__module__}.{named.__qualname__}")
        if levels > 0:
            self.add(_contents(value), levels - 1)


def _contents(value: object) -> object:
    """Return what an object holds: the values that a function's body refers to, or attributes.

    Models do not count: they are large, and their weights are hashed where they matter.
    """
    if isinstance(value, FunctionType):
        return [value.__defaults__, value.__kwdefaults__, *_cells(value)]
    attributes = getattr(value, "__dict__", {})
    if isinstance(value, (nn.Module, type)) or isinstance(attributes.get("model"), nn.Module):
        return None
    return attributes


def _cells(function: Callable[..., Any]) -> Iterable[object]:
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            yield None


def _key(key: object) -> str:
    """Return a name of a mapping's key that is the same in any process."""
    parts = cast("tuple[object, ...]", key) if isinstance(key, tuple) else (key,)
    if all(isinstance(it, _PLAIN) for it in parts):
        return repr(parts)
    return type(cast("object", key)).__qualname__


def _stored(tensor: Tensor) -> Tensor:
    """Return the values of a tensor as they are stored, if it is packed or quantised."""
    packed = getattr(tensor, "_qdata", None)
    return packed if isinstance(packed, Tensor) else tensor.detach().as_subclass(Tensor)


def _sample(tensor: Tensor) -> Tensor:
    """Return values from the middle, which lie together: weights may be read from a disk, a page at a time."""
    while tensor.ndim > 1:
        tensor = tensor.select(0, tensor.shape[0] // 2) if tensor.shape[0] else tensor.flatten()
    return tensor.reshape(-1)[:_SAMPLE_VALUES]
