"""What lies side by side in host memory goes to the device in one copy.

A layer has some twenty tensors, most of them small: starting a copy of each would take longer than the copies do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory.meter import rounded_bytes, storage_key
from ..units import MIB

# About as large as the largest tensors are by themselves: blocks that the device's allocator finds room for.
_MOST_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, eq=False)
class TransferBlock:
    """One copy. `on_host` is what is copied: a tensor, or the bytes of several; `tensors` are those, by their places
    in the sequence that was packed.
    """

    on_host: Tensor
    tensors: dict[int, Tensor]

    def unpacked(self, on_device: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The tensors' copies in a copy of `on_host`, by their places."""
        if len(self.tensors) == 1:
            yield next(iter(self.tensors)), on_device
            return
        for place, tensor in self.tensors.items():
            start = _first_byte(tensor) - self.on_host.storage_offset()
            yield place, on_device[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def packed(tensors: Sequence[Tensor], alone: Sequence[bool]) -> list[TransferBlock]:
    """Parcels of tensors in host memory: of those that follow one another in blocks of the device's allocator, so that
    together they take what each would. Where `alone` says so, a tensor is a parcel by itself.
    """
    runs: list[dict[int, Tensor]] = []
    closed = True
    for place in sorted(range(len(tensors)), key=lambda place: tensors[place].data_ptr()):
        tensor, single = tensors[place], alone[place] or not tensors[place].is_contiguous()
        if closed or single or not _continues(runs[-1], tensor):
            runs.append({})
        runs[-1][place] = tensor
        closed = single
    return [_block(run) for run in runs]


def _continues(run: dict[int, Tensor], tensor: Tensor) -> bool:
    first, last = _ends(run)
    return (
        storage_key(tensor) == storage_key(last)
        and _first_byte(tensor) == _first_byte(last) + rounded_bytes(last.nbytes)
        and _first_byte(tensor) + tensor.nbytes - _first_byte(first) <= _MOST_BYTES
    )


def _block(run: dict[int, Tensor]) -> TransferBlock:
    first, last = _ends(run)
    if first is last:
        return TransferBlock(first, run)
    start, end = _first_byte(first), _first_byte(last) + last.nbytes
    return TransferBlock(first.flatten().view(torch.uint8).as_strided((end - start,), (1,), start), run)


def _ends(run: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    tensors = list(run.values())
    return tensors[0], tensors[-1]


def _first_byte(tensor: Tensor) -> int:
    """Where it begins in its storage."""
    return int(tensor.storage_offset()) * tensor.itemsize
