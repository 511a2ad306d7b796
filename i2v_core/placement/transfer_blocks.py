"""Transfer blocks: tensors that are adjacent in host memory are copied to the device in one copy.

A layer has some twenty tensors, most of them small: starting a copy of each would take longer than the copies do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory.meter import rounded_bytes, storage_key
from ..units import MIB

# About the size of the largest single tensors, so that the device's allocator finds room for a block.
_MAX_BYTES = 32 * MIB


@dataclass(frozen=True, slots=True, eq=False)
class TransferBlock:
    """Memory that one copy transfers."""

    on_host: Tensor
    """The source: a tensor, or the bytes of several."""

    tensors: dict[int, Tensor]
    """The tensors in it, by their index in the sequence that was packed."""

    def unpacked(self, on_device: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the index and the copy of each tensor, as views of `on_device`, a copy of `on_host`."""
        if len(self.tensors) == 1:
            yield next(iter(self.tensors)), on_device
            return
        for index, tensor in self.tensors.items():
            start = _first_byte(tensor) - self.on_host.storage_offset()
            yield index, on_device[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def packed(tensors: Sequence[Tensor], separate: Sequence[bool]) -> list[TransferBlock]:
    """Pack tensors in host memory into blocks; where `separate` is true, a tensor gets a block of its own.

    Only tensors that are adjacent once rounded up to the device allocator's block size share a block, so that together
    they take no more device memory than one by one.
    """
    runs: list[dict[int, Tensor]] = []
    closed = True
    for index in sorted(range(len(tensors)), key=lambda index: tensors[index].data_ptr()):
        tensor, single = tensors[index], separate[index] or not tensors[index].is_contiguous()
        if closed or single or not _continues(runs[-1], tensor):
            runs.append({})
        runs[-1][index] = tensor
        closed = single
    return [_block(run) for run in runs]


def _continues(run: dict[int, Tensor], tensor: Tensor) -> bool:
    first, last = _first_and_last(run)
    return (
        storage_key(tensor) == storage_key(last)
        and _first_byte(tensor) == _first_byte(last) + rounded_bytes(last.nbytes)
        and _first_byte(tensor) + tensor.nbytes - _first_byte(first) <= _MAX_BYTES
    )


def _block(run: dict[int, Tensor]) -> TransferBlock:
    first, last = _first_and_last(run)
    if first is last:
        return TransferBlock(first, run)
    start, end = _first_byte(first), _first_byte(last) + last.nbytes
    return TransferBlock(first.flatten().view(torch.uint8).as_strided((end - start,), (1,), start), run)


def _first_and_last(run: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
    tensors = list(run.values())
    return tensors[0], tensors[-1]


def _first_byte(tensor: Tensor) -> int:
    """Return the offset of a tensor in its storage, in bytes."""
    return int(tensor.storage_offset()) * tensor.itemsize
