"""Weights that stay in host memory and come to the device for as long as the layer that needs them runs.

While one layer computes, the next one's weights are on their way: from pinned memory, on a stream of their own. So the
device holds the weights of two layers at most. Which layer comes next is learned from the first pass. Without CUDA the
same code runs, and nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layer_calls import LayerCall, LayerRunner
from .staging import staged
from .storage import StoredWeights, WeightStorage
from .swap import all_tensors, own_tensors, swapped
from .transfer_blocks import TransferBlock, packed

Modules = tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Prefetch:
    """The weights of one layer, on the device or on their way there: the module's tensors, and their copies, which lie
    as `weights` says.

    `event` is the CUDA event of the copies' end; None where they have ended already.
    """

    tensors: list[Tensor]
    copies: list[Tensor]
    weights: StoredWeights
    event: Any

    def wait(self) -> None:
        """Order the current stream behind the copy: before the weights are used, and before their memory is."""
        if self.event is not None:
            self.event.wait()

    def in_place(self) -> AbstractContextManager[None]:
        self.wait()
        # One after another, so that what lay in 8 bits is given up at once: the host has it.
        for index, tensor in enumerate(self.tensors):
            self.copies[index] = self.weights.dequantized(tensor, self.copies[index])
        return swapped(self.tensors, self.copies)


class WeightStream(LayerRunner):
    """Brings in the weights of each layer around its call. Made by `streamed` and `streamed_leaves`.

    `loaded_bytes` is the traffic so far: what has been copied to the device.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        weights: StoredWeights,
        tensors_of: Callable[[nn.Module], list[Tensor]],
    ) -> None:
        self.loaded_bytes = 0
        # Kept, since a layer that follows itself is fetched while the module holds its copies on the device.
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
        """The context in which the modules' weights are on the device."""
        arrival = self._fetched.pop(modules, None) or self._fetch(modules)
        if self._previous is not None:
            self._following[self._previous] = modules
        self._previous = modules
        with arrival.in_place():
            following = self._following.get(modules)
            if following is not None:
                # Only one layer ahead: what was fetched for a layer that did not come is dropped.
                ahead = self._fetched.pop(following, None)
                self._drop_fetched()
                self._fetched[following] = ahead or self._fetch(following)
            yield

    def _drop_fetched(self) -> None:
        """Give up what was fetched ahead. Its memory may go to others only after the copy that still writes to it."""
        for arrival in self._fetched.values():
            arrival.wait()
        self._fetched.clear()

    def close(self) -> None:
        """Let go of all memory, on the device and on the host."""
        self._drop_fetched()
        self._packed.clear()
        self._on_host.clear()

    def _fetch(self, modules: Modules) -> _Prefetch:
        if modules not in self._packed:
            self._packed[modules] = self._pack(modules)
        tensors, parcels = self._packed[modules]
        self.loaded_bytes += sum(self._on_host[tensor].nbytes for tensor in tensors)
        # Allocated on the current stream, which frees them too; so the copy must wait for the memory's last use there.
        on_device = [torch.empty_like(parcel.on_host, device=self._device) for parcel in parcels]
        copies = dict(it for parcel, copy in zip(parcels, on_device, strict=True) for it in parcel.unpacked(copy))
        event = self._copy(parcels, on_device)
        return _Prefetch(tensors, [copies[place] for place in range(len(tensors))], self._weights, event)

    def _pack(self, modules: Modules) -> tuple[list[Tensor], list[TransferBlock]]:
        tensors = [tensor for module in modules for tensor in self._tensors_of(module)]
        # What layers do not compute with as it lies is given up one by one, when it has been restored.
        alone = [not self._weights.computes_with(tensor) for tensor in tensors]
        return tensors, packed([self._on_host[tensor] for tensor in tensors], alone)

    def _copy(self, parcels: list[TransferBlock], on_device: list[Tensor]) -> Any:
        """The event of the copies' end; None where they have ended already."""
        if self._copy_stream is None:
            for parcel, copy in zip(parcels, on_device, strict=True):
                copy.copy_(parcel.on_host)
            return None
        self._copy_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copy_stream):
            for parcel, copy in zip(parcels, on_device, strict=True):
                copy.copy_(parcel.on_host, non_blocking=True)
            return self._copy_stream.record_event()


@contextmanager
def streamed(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    storage: WeightStorage = WeightStorage.AS_COMPUTED,
) -> Generator[WeightStream]:
    """For a module whose forward runs layer by layer through a `LayerRunner`: the runner that brings weights in."""
    weights = StoredWeights(module, device, dtype, storage)
    with staged(module, weights, pinned=device.type == "cuda"):
        stream = WeightStream(module, device, weights, all_tensors)
        try:
            yield stream
        finally:
            stream.close()


@contextmanager
def streamed_leaves(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Generator[WeightStream]:
    """For a module that runs as it is: hooks bring in every submodule's own weights around its call."""
    weights = StoredWeights(module, device, dtype, WeightStorage.AS_COMPUTED)
    with staged(module, weights, pinned=device.type == "cuda"):
        stream = WeightStream(module, device, weights, own_tensors)
        inside: dict[nn.Module, ExitStack] = {}

        def bring_in(owner: nn.Module, _: object) -> None:
            inside[owner] = ExitStack()
            inside[owner].enter_context(stream.around((owner,)))

        def take_out(owner: nn.Module, _: object, __: object) -> None:
            inside.pop(owner).close()

        with ExitStack() as hooks:
            for owner in module.modules():
                if own_tensors(owner):
                    hooks.callback(owner.register_forward_pre_hook(bring_in).remove)
                    hooks.callback(owner.register_forward_hook(take_out, always_call=True).remove)
            hooks.callback(stream.close)
            yield stream
