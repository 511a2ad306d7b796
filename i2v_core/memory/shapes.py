"""What operations make of meta tensors, worked out once for the same shapes.

Most of PyTorch's kernels for meta tensors are written in Python and take a tenth of a millisecond or more. A model runs
the same few layers over and over, so most of what they would work out is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch

from .meter import storage_key, tensors_in


class _Shape(NamedTuple):
    """What an operation knows of a meta tensor."""

    sizes: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Shape:
        return cls(tensor.shape, tensor.stride(), tensor.dtype)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.sizes, self.strides, dtype=self.dtype, device="meta")


class KnownShapes:
    """Runs operations: one that makes new meta tensors of others once, and then only allocates such tensors.

    Views, operations in place, and all that touches another device run as ever.
    """

    def __init__(self) -> None:
        self._known: dict[object, tuple[_Shape, ...]] = {}

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        asked = _described((args, *kwargs.items())) if _only_makes(func) else None
        if asked is None:
            return func(*args, **kwargs)
        known = self._known.get((func, asked))
        if known is not None:
            made = [shape.empty() for shape in known]
            return tuple(made) if len(made) > 1 else made[0]
        result = func(*args, **kwargs)
        given = {storage_key(tensor) for tensor in tensors_in((args, kwargs))}
        tensors = list(tensors_in(result))
        # Not all that a schema calls new is: `_unsafe_view` is a view.
        if tensors and all(storage_key(tensor) not in given and _is_like_new(tensor) for tensor in tensors):
            self._known[func, asked] = tuple(map(_Shape.of, tensors))
        return result


@lru_cache(maxsize=1024)
def _only_makes(func: Any) -> bool:
    """Whether an operator changes none of its arguments, and gives nothing but new tensors."""
    schema = func._schema
    return not schema.is_mutable and all(it.alias_info is None and str(it.type) == "Tensor" for it in schema.returns)


def _described(value: object) -> object:
    """All of an argument that an operation's result goes by; None where it has a tensor that is not on meta."""
    if isinstance(value, torch.Tensor):
        return _Shape.of(value) if value.is_meta and value.layout is torch.strided else None
    if isinstance(value, (list, tuple)):
        items = tuple(map(_described, cast("Sequence[object]", value)))
        return None if None in items else items
    return type(value), value  # 1, 1.0 and True are equal


def _is_like_new(tensor: torch.Tensor) -> bool:
    """Whether its storage is as large as it would be allocated."""
    return tensor.is_meta and tensor.untyped_storage().nbytes() == _Shape.of(tensor).empty().untyped_storage().nbytes()
