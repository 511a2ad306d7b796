"""Counting the memory of live tensors, on any device, without a GPU.

The meter watches every operation and counts the storages that operations allocate until they are freed. It needs no
values: real CPU or CUDA tensors, fake tensors and meta tensors are counted alike, so the same code measures a run,
traces a forward that never runs, and emulates a card of N bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

ALLOCATION_BYTES = 512
"""Block size of PyTorch's CUDA allocator, which rounds every allocation up to a multiple of it."""

_in_host_memory: ContextVar[bool] = ContextVar("in_host_memory", default=False)


def rounded_bytes(size_bytes: int) -> int:
    """Return the bytes that the CUDA allocator takes for a request of `size_bytes`."""
    return -(-size_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


@contextmanager
def host_memory() -> Generator[None]:
    """Count storages that are allocated within the context as host memory, which no meter adds to the device's.

    Needed where the metered device is emulated by the CPU or by meta tensors, so that a tensor's own device does not
    tell the two memories apart.
    """
    token = _in_host_memory.set(True)
    try:
        yield
    finally:
        _in_host_memory.reset(token)


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return func(*args, **kwargs)


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of live tensor storages; use it as a context manager around the code to measure.

    Counted are storages that operations inside the context allocate as results, until they are freed, which may be
    after the context has ended. Not counted are tensors that existed before (`add` counts those), views of them,
    storages allocated under `host_memory`, and memory that an operation allocates and frees within itself. The meter
    holds weak references only: it keeps no tensor alive. `host_peak_bytes` is the peak of storages allocated under
    `host_memory`.

    Args:
        limit_bytes: the size of the emulated device. An operation whose result would exceed it fails with a
            `torch.OutOfMemoryError`, and leaves the count as it was before.
        device_type: count only storages on this type of device ("cuda", "cpu", "meta"); None counts all.
        on_change: called with the bytes in use each time that they change.
        run: runs each operation, given its function and arguments.

    Fake tensors: enter the meter inside the `FakeTensorMode`.
    """

    def __init__(
        self,
        *,
        limit_bytes: int | None = None,
        device_type: str | None = None,
        on_change: Callable[[int], None] | None = None,
        run: Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any] = _run,
    ) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.limit_bytes = limit_bytes
        self.on_change = on_change
        self.device_type = device_type
        self.current_bytes = 0
        self.peak_bytes = 0
        self.host_peak_bytes = 0
        self._run = run
        self._host_bytes = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, *items: torch.Tensor | nn.Module) -> None:
        """Count tensors, or the parameters and buffers of modules, that were allocated outside the context.

        Raises:
            torch.OutOfMemoryError: they exceed the limit.
        """
        for item in items:
            for tensor in _state(item) if isinstance(item, nn.Module) else (item,):
                self._count(tensor)

    @contextmanager
    def counted(self, module: nn.Module) -> Generator[None]:
        """Count a module's parameters and buffers within the context, where they were allocated outside the meter."""
        new = [tensor.data for tensor in _state(module) if storage_key(tensor) not in self._storages]
        self.add(*new)
        try:
            yield
        finally:
            # Held until here, so that no storage of `new` can have died and been forgotten in the meantime.
            for tensor in {storage_key(tensor): tensor for tensor in new}.values():
                del self._storages[storage_key(tensor)]
                self._change(-rounded_bytes(tensor.untyped_storage().nbytes()))

    def reset_peak(self) -> None:
        """Start a new peak from what is live now."""
        self.peak_bytes = self.current_bytes

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        try:
            self._count_new(result, (args, kwargs))
        except torch.OutOfMemoryError as error:
            del result  # the traceback holds this frame and those below it: the result must not survive in them
            raise error.with_traceback(None)  # noqa: B904
        return result

    def _count_new(self, result: Any, inputs: Any) -> None:
        unknown = [tensor for tensor in tensors_in(result) if storage_key(tensor) not in self._storages]
        if unknown:
            known = {storage_key(tensor) for tensor in tensors_in(inputs)}
            for tensor in unknown:
                if storage_key(tensor) not in known:
                    self._count(tensor)

    def _count(self, tensor: torch.Tensor) -> None:
        if storage_key(tensor) in self._storages:
            return
        if _in_host_memory.get():
            self._watch_host(tensor)
            return
        if self.device_type not in (None, tensor.device.type):
            self._watch(tensor, 0)
            return
        size_bytes = rounded_bytes(tensor.untyped_storage().nbytes())
        if self.limit_bytes is not None and self.current_bytes + size_bytes > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"Emulated device out of memory. Tried to allocate {size_bytes} bytes: "
                f"{self.current_bytes} of {self.limit_bytes} bytes are in use."
            )
        self._watch(tensor, size_bytes)
        self._change(size_bytes)

    def _change(self, by_bytes: int) -> None:
        self.current_bytes += by_bytes
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)
        if self.on_change is not None:
            self.on_change(self.current_bytes)

    def _watch_host(self, tensor: torch.Tensor) -> None:
        """Track a storage in host memory, which is counted apart."""
        size_bytes = tensor.untyped_storage().nbytes()
        self._watch(tensor, 0)
        self._host_bytes += size_bytes
        self.host_peak_bytes = max(self.host_peak_bytes, self._host_bytes)
        weakref.finalize(tensor.untyped_storage(), _forget_host, weakref.ref(self), size_bytes)

    def _watch(self, tensor: torch.Tensor, size_bytes: int) -> None:
        """Track a storage, and subtract its bytes when it is freed."""
        key = storage_key(tensor)

        def forget(_: object) -> None:
            del self._storages[key]
            if size_bytes:
                self._change(-size_bytes)

        if key not in self._storages:
            self._storages[key] = weakref.ref(tensor.untyped_storage(), forget)


def _forget_host(meter: weakref.ref[StorageMeter], size_bytes: int) -> None:
    """Subtract a freed storage in host memory from its meter, unless that has been freed before."""
    if (alive := meter()) is not None:
        alive._host_bytes -= size_bytes  # pyright: ignore[reportPrivateUsage]


class _OutputOnlyAttention(TorchFunctionMode):
    """Replaces PyTorch's attention by the allocation of its output."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _attention_output(*args, **kwargs)
        return func(*args, **kwargs)


def _attention_output(
    query: torch.Tensor,
    key: torch.Tensor,  # noqa: ARG001
    value: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    log_sum_exp = query.new_empty(query.shape[:-1], dtype=torch.float32)  # the kernel's own, freed on return
    output = torch.empty_like(query)
    del log_sum_exp
    return output if value.shape[-1] == query.shape[-1] else query.new_empty(*query.shape[:-1], value.shape[-1])


def fused_attention() -> TorchFunctionMode:
    """Return a context in which scaled dot-product attention allocates what a fused GPU kernel does, without computing.

    That is the output, in the query's layout, and during the call one fp32 number for each query row
    (FlashAttention-2's log-sum-exp). For tracing only: on meta and fake tensors PyTorch would take the mathematical
    form, which allocates the full matrix of scores.
    """
    return _OutputOnlyAttention()


def _state(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def storage_key(tensor: torch.Tensor) -> int:
    """Return a key that is unique among live storages."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the strided tensors in an operation's arguments or results, nested ones included, as those that a tensor
    subclass wraps (quantised weights): its own storage is empty.
    """
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):
            yield from tensors_in([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        elif value.layout is torch.strided:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in cast("Iterable[Any]", value):
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in cast("dict[Any, Any]", value).values():
            yield from tensors_in(item)
