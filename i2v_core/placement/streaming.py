"""Weight streaming: weights stay in host memory and are copied to the device while the layer that needs them runs.

While one layer computes, the next one's weights are prefetched from pinned memory on a CUDA stream of their own, so the
device holds the weights of two layers at most. The order of layers is learned from the first pass. Without CUDA the
same code runs, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..memory.meter import host_memory, rounded_bytes
from ..units import MIB
from .layer_calls import LayerCall, LayerRunner
from .storage import StoredWeights, WeightStorage
from .swap import all_tensors, own_tensors, swapped
from .transfer_blocks import TransferBlock, packed

Modules = tuple[nn.Module, ...]

# PyTorch rounds pinned allocations up to a power of two, so tensors share slabs of such a size.
_SLAB_BYTES = 256 * MIB


@dataclass(frozen=True, slots=True, eq=False)
class _Prefetch:
    """The weights of one layer that are on the device, or being copied there."""

    tensors: list[Tensor]
    """The module's tensors."""

    copies: list[Tensor]
    """Copies of these on the device, in their storage format."""

    weights: StoredWeights

    event: Any
    """The CUDA event after the copies; None where they have finished already."""

    def wait(self) -> None:
        """Make the current stream wait for the copies, before the weights or their memory are used."""
        if self.event is not None:
            self.event.wait()

    def in_place(self) -> AbstractContextManager[None]:
        """Let the module's tensors hold the copies within the context, dequantised."""
        self.wait()
        # One after another, so that each stored copy is freed as soon as it is dequantised.
        for index, tensor in enumerate(self.tensors):
            self.copies[index] = self.weights.dequantized(tensor, self.copies[index])
        return swapped(self.tensors, self.copies)


class WeightStream(LayerRunner):
    """Copies the weights of each layer to the device around its call. Made by `streamed` and `streamed_leaves`.

    `loaded_bytes` counts the bytes that have been copied to the device so far.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        weights: StoredWeights,
        tensors_of: Callable[[nn.Module], list[Tensor]],
    ) -> None:
        self.loaded_bytes = 0
        # Kept apart from the module, which holds the device copies while a layer that follows itself is prefetched.
        self._on_host = {tensor: tensor.data for tensor in all_tensors(module)}
        self._device = device
        self._weights = weights
        self._tensors_of = tensors_of
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._packed: dict[Modules, tuple[list[Tensor], list[TransferBlock]]] = {}
        self._following: dict[Modules, Modules] = {}
        self._fetched: dict[Modules, _Prefetch] = {}
        self._previous: Modules | None = None

    def enter(self, call: LayerCall) -> AbstractContextManager[None]:
        return self.around(call.modules)

    @contextmanager
    def around(self, modules: Modules) -> Generator[None]:
        """Hold the modules' weights on the device within the context, and prefetch the next layer's."""
        prefetch = self._fetched.pop(modules, None) or self._fetch(modules)
        if self._previous is not None:
            self._following[self._previous] = modules
        self._previous = modules
        with prefetch.in_place():
            following = self._following.get(modules)
            if following is not None:
                # Only one layer ahead: a prefetch for a layer that did not run after all is dropped.
                ahead = self._fetched.pop(following, None)
                self._drop_fetched()
                self._fetched[following] = ahead or self._fetch(following)
            yield

    def _drop_fetched(self) -> None:
        """Free prefetched weights, after the copies that still write to their memory."""
        for prefetch in self._fetched.values():
            prefetch.wait()
        self._fetched.clear()

    def close(self) -> None:
        """Free all memory, on the device and on the host."""
        self._drop_fetched()
        self._packed.clear()
        self._on_host.clear()

    def _fetch(self, modules: Modules) -> _Prefetch:
        if modules not in self._packed:
            self._packed[modules] = self._pack(modules)
        tensors, blocks = self._packed[modules]
        self.loaded_bytes += sum(self._on_host[tensor].nbytes for tensor in tensors)
        # Allocated on the current stream, which frees them too; so the copy must wait for the memory's last use there.
        on_device = [torch.empty_like(block.on_host, device=self._device) for block in blocks]
        copies = dict(it for block, copy in zip(blocks, on_device, strict=True) for it in block.unpacked(copy))
        event = self._copy(blocks, on_device)
        return _Prefetch(tensors, [copies[place] for place in range(len(tensors))], self._weights, event)

    def _pack(self, modules: Modules) -> tuple[list[Tensor], list[TransferBlock]]:
        tensors = [tensor for module in modules for tensor in self._tensors_of(module)]
        # Tensors that must be dequantised are blocks of their own, so that each can be freed once it has been.
        separate = [not self._weights.computes_with(tensor) for tensor in tensors]
        return tensors, packed([self._on_host[tensor] for tensor in tensors], separate)

    def _copy(self, blocks: list[TransferBlock], on_device: list[Tensor]) -> Any:
        """Copy the blocks; returns the event after the copies, or None where they have finished already."""
        if self._copy_stream is None:
            for block, copy in zip(blocks, on_device, strict=True):
                copy.copy_(block.on_host)
            return None
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copy_stream):
            for block, copy in zip(blocks, on_device, strict=True):
                copy.copy_(block.on_host, non_blocking=True)
            return self._copy_stream.record_event()


@contextmanager
def streamed(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    storage: WeightStorage = WeightStorage.AS_COMPUTED,
) -> Generator[WeightStream]:
    """Stream the weights of a module whose forward runs through a `LayerRunner`; yields that runner."""
    weights = StoredWeights(module, device, dtype, storage)
    with staged(module, weights, pinned=device.type == "cuda"):
        stream = WeightStream(module, device, weights, all_tensors)
        try:
            yield stream
        finally:
            stream.close()


@contextmanager
def streamed_leaves(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Generator[WeightStream]:
    """Stream the weights of a module that runs its own forward, by hooks around every submodule's call."""
    weights = StoredWeights(module, device, dtype, WeightStorage.AS_COMPUTED)
    with staged(module, weights, pinned=device.type == "cuda"):
        stream = WeightStream(module, device, weights, own_tensors)
        loaded: dict[nn.Module, ExitStack] = {}

        def load(owner: nn.Module, _: object) -> None:
            loaded[owner] = ExitStack()
            loaded[owner].enter_context(stream.around((owner,)))

        def unload(owner: nn.Module, _: object, __: object) -> None:
            loaded.pop(owner).close()

        with ExitStack() as hooks:
            for owner in module.modules():
                if own_tensors(owner):
                    hooks.callback(owner.register_forward_pre_hook(load).remove)
                    hooks.callback(owner.register_forward_hook(unload, always_call=True).remove)
            hooks.callback(stream.close)
            yield stream


@contextmanager
def staged(module: nn.Module, weights: StoredWeights, *, pinned: bool) -> Generator[None]:
    """Hold a module's tensors in host memory in their storage format within the context, `pinned` for copies to a GPU.

    Afterwards the module holds its own tensors again, bit for bit. Takes host memory for each tensor whose format is
    not the module's own, and for all of them if pinned.
    """
    tensors = all_tensors(module)
    stored = (_as_stored(tensor, weights) for tensor in tensors)
    with swapped(tensors, _pinned(stored) if pinned else list(stored)):
        yield


def _as_stored(tensor: Tensor, weights: StoredWeights) -> Tensor:
    reduced = weights.reduced(tensor)
    if reduced is not None or not tensor.is_floating_point():
        return tensor.data if reduced is None else reduced
    with host_memory():
        return tensor.data.to(weights.dtype_of(tensor))


def _pinned(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return copies in pinned memory, packed into slabs; a tensor larger than a slab has one of its own."""
    copies: list[Tensor] = []
    slab, used_bytes = torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        if used_bytes + tensor.nbytes > slab.numel():
            with host_memory():
                slab = torch.empty(max(_SLAB_BYTES, tensor.nbytes), dtype=torch.uint8, pin_memory=True)
            used_bytes = 0
        copy = slab[used_bytes : used_bytes + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        used_bytes += rounded_bytes(tensor.nbytes)
    return copies
