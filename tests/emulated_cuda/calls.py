"""PyTorch calls on tensors of the emulated card, computed on the CPU under CUDA's rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from i2v_core.memory.meter import storage_key, tensors_in

from .card import CARD, HOST, EmulatedCard

_GETTERS = {
    torch.Tensor.device.__get__: lambda on_card: CARD if on_card else HOST,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.is_cuda.__get__: lambda on_card: on_card,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.is_cpu.__get__: lambda on_card: not on_card,  # pyright: ignore[reportAttributeAccessIssue]
}
_MOVES = {torch.Tensor.to, torch.as_tensor, torch.asarray}
_INDEXES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_ACROSS = {torch.Tensor.copy_, torch._has_compatible_shallow_copy_type}  # pyright: ignore[reportAttributeAccessIssue]
_COPIES = {torch.Tensor.copy_, torch.Tensor.__setitem__}
_VALUES = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
    torch.Tensor.__index__,
    torch.Tensor.nonzero,
    torch.nonzero,
    torch.equal,
    torch.allclose,
}
"""Calls that read values, for which the host must wait."""
_METADATA = {
    torch.Tensor.__len__,
    torch.Tensor.data_ptr,
    torch.Tensor.dim,
    torch.Tensor.element_size,
    torch.Tensor.is_contiguous,
    torch.Tensor.is_floating_point,
    torch.Tensor.numel,
    torch.Tensor.size,
    torch.Tensor.storage_offset,
    torch.Tensor.stride,
    torch.Tensor.untyped_storage,
}
"""Calls that neither look into memory nor make any; so do all properties."""


class Allocations(TorchDispatchMode):
    """Puts tensors that operations allocate on the card, while `on_card` is true."""

    def __init__(self, card: EmulatedCard) -> None:
        super().__init__()
        self.on_card = False
        self._card = card

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.on_card:
            known = {storage_key(tensor) for tensor in tensors_in((args, kwargs))}
            for tensor in tensors_in(result):
                if storage_key(tensor) not in known and not tensor.is_meta:
                    self._card.put(tensor)
        return result


class Calls(TorchFunctionMode):
    """Intercepts every PyTorch call from Python, to track which device its inputs and results are on."""

    def __init__(self, card: EmulatedCard, allocations: Allocations) -> None:
        super().__init__()
        self._card, self._allocations = card, allocations

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _GETTERS and not args[0].is_meta:
            return _GETTERS[func](self._card.holds(args[0]))
        if func in _METADATA or getattr(func, "__name__", "") == "__get__":
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.is_pinned:
            return self._card.has_pinned(args[0])
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            func, args, kwargs = torch.Tensor.to, (args[0], CARD if func is torch.Tensor.cuda else HOST), {}
        asked, args, kwargs = _asked_device(func, args, kwargs, self._card)
        given = list(tensors_in((args, kwargs)))
        if (asked is not None and asked.type == "meta") or any(tensor.is_meta for tensor in given):
            return func(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", False)
        self._check(func, args, given)
        goes_to_card = asked.type == "cuda" if asked is not None else any(map(self._card.holds, given))
        before, self._allocations.on_card = self._allocations.on_card, goes_to_card
        try:
            staging = self._staging(func, args, kwargs) if func in _COPIES else None
            result, made, written = _called(func, args, kwargs, given)
            del staging
            moves = asked is not None and bool(given) and not made and self._card.holds(given[0]) != goes_to_card
            if moves and func in _MOVES:
                result = result.clone()
                made = [result]
        finally:
            self._allocations.on_card = before
        for tensor in made:
            if goes_to_card:  # some are allocated without a visible operation, as by `torch.tensor`
                self._card.put(tensor)
            elif pinned:
                self._card.pin(tensor)
        self._order(func, kwargs, given, made, written)
        return result

    def _check(self, func: Callable[..., Any], args: tuple[Any, ...], given: list[Tensor]) -> None:
        """Raise the errors that CUDA raises for tensors on different devices."""
        if func in _MOVES or func in _ACROSS or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and self._card.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func in _INDEXES:
            given = [args[0], *(tensor for tensor in tensors_in(args[1]) if self._card.holds(tensor))]
        places = {self._card.holds(tensor) for tensor in given if tensor.ndim or self._card.holds(tensor)}
        if len(places) > 1:
            shapes = ", ".join(f"{tuple(it.shape)} on {CARD if self._card.holds(it) else HOST}" for it in given)
            raise RuntimeError(f"Expected all tensors to be on the same device in {func.__name__}, but found {shapes}")

    def _staging(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The contiguous form on the card of what a copy between host and card does not find laid out alike; to be kept
        while the copy is made. Conversions are the host's, but for copies that it does not wait for.
        """
        source = args[-1]
        if not isinstance(source, Tensor) or self._card.holds(source) == self._card.holds(args[0]):
            return None
        target = args[0] if func is torch.Tensor.copy_ else args[0][args[1]]
        on_card, on_host = (source, target) if self._card.holds(source) else (target, source)
        alike = source.shape == target.shape and source.stride() == target.stride()
        converts = source.dtype != target.dtype and kwargs.get("non_blocking", False)
        if converts or not (alike or on_card.is_contiguous()):
            return torch.empty(on_card.shape, dtype=on_host.dtype if converts else on_card.dtype)
        return None

    def _order(
        self,
        func: Callable[..., Any],
        kwargs: dict[str, Any],
        given: list[Tensor],
        made: list[Tensor],
        written: list[Tensor],
    ) -> None:
        """Record the call's reads and writes with the streams, if there are any."""
        takes_values = func in _VALUES or func in (torch.Tensor.numpy, torch.Tensor.__array__)
        if not (made or written or takes_values):
            return
        writes = {storage_key(tensor) for tensor in (*made, *written)}
        reads = {storage_key(tensor) for tensor in given} - writes
        places = {self._card.holds(tensor) for tensor in (*given, *made)}
        crosses = len(places) > 1 and (func in _MOVES or func in _COPIES)
        blocking = takes_values or (crosses and not kwargs.get("non_blocking", False))
        if True in places:
            self._card.streams.on_card(func.__name__, reads, writes, blocking=blocking)
        else:
            self._card.streams.on_host(func.__name__, reads, writes)


def _called(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]
) -> tuple[Any, list[Tensor], list[Tensor]]:
    """Run a call; returns its result, the new tensors in it, and the given tensors that it wrote to."""
    versions = [tensor._version for tensor in given]
    known = {storage_key(tensor) for tensor in given}
    result = func(*args, **kwargs)
    made = [tensor for tensor in tensors_in(result) if storage_key(tensor) not in known]
    written = [tensor for tensor, version in zip(given, versions, strict=True) if tensor._version != version]
    return result, made, written


def _asked_device(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], card: EmulatedCard
) -> tuple[torch.device | None, tuple[Any, ...], dict[str, Any]]:
    """Return the device that a call names, and the call's arguments for the CPU instead."""
    asked: torch.device | None = None
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        kwargs = {**kwargs, "device": _real(asked)}
    if func is torch.Tensor.to:
        named = [torch.device(it) for it in args[1:] if isinstance(it, (str, torch.device))]
        like = [CARD if card.holds(it) else HOST for it in (*args[1:], kwargs.get("other")) if isinstance(it, Tensor)]
        asked = next(iter([*named, *like]), asked)
        args = tuple(_real(torch.device(it)) if isinstance(it, (str, torch.device)) else it for it in args)
    return asked, args, kwargs


def _real(device: torch.device) -> torch.device:
    return HOST if device.type == "cuda" else device
