"""A cache of the shapes that operations on meta tensors result in.

Most of PyTorch's kernels for meta tensors are written in Python and take a tenth of a millisecond or more. A model runs
the same few layers over and over, so most results can be taken from a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch

from .meter import storage_key, tensors_in


class _Shape(NamedTuple):
    """Shape, layout and dtype of a meta tensor, which is all that an operation on it depends on."""

    sizes: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Shape:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device="meta")


class KnownShapes:
    """Runs operations; one that returns new meta tensors runs once for the same arguments, and is cached then.

    Views, in-place operations, and operations on other devices always run.
    """

    def __init__(self) -> None:
        self._cached: dict[object, tuple[_Shape, ...]] = {}

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        key = _cache_key((args, *kwargs.items())) if _returns_new_tensors(func) else None
        if key is None:
            return func(*args, **kwargs)
        cached = self._cached.get((func, key))
        if cached is not None:
            made = [shape.empty() for shape in cached]
            return tuple(made) if len(made) > 1 else made[0]
        result = func(*args, **kwargs)
        given = {storage_key(tensor) for tensor in tensors_in((args, kwargs))}
        tensors = list(tensors_in(result))
        # A schema may call a result new that is not: `_unsafe_view` returns a view.
        if tensors and all(storage_key(tensor) not in given and _is_like_new(tensor) for tensor in tensors):
            self._cached[func, key] = tuple(map(_Shape.of, tensors))
        return result


@lru_cache(maxsize=1024)
def _returns_new_tensors(func: Any) -> bool:
    """Whether an operator changes none of its arguments, and returns nothing but new tensors."""
    schema = func._schema
    return not schema.is_mutable and all(it.alias_info is None and str(it.type) == "Tensor" for it in schema.returns)


def _cache_key(value: object) -> object:
    """Return a hashable key of an argument; None where it holds a tensor that is not on meta."""
    if isinstance(value, torch.Tensor):
        return _Shape.of(value) if value.is_meta and value.layout is torch.strided else None
    if isinstance(value, (list, tuple)):
        items = tuple(map(_cache_key, cast("Sequence[object]", value)))
        return None if None in items else items
    return type(value), value  # 1, 1.0 and True are equal


def _is_like_new(tensor: torch.Tensor) -> bool:
    """Whether a tensor's storage has the size of a newly allocated one, and so is no view of a larger one."""
    return tensor.is_meta and tensor.untyped_storage().nbytes() == _Shape.of(tensor).empty().untyped_storage().nbytes()
