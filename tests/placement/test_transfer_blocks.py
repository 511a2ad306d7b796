"""Transfer blocks: equal tensors, one copy for adjacent ones, and no more device memory."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from i2v_core.memory.meter import ALLOCATION_BYTES, rounded_bytes
from i2v_core.placement import transfer_blocks
from i2v_core.placement.storage import StoredWeights, WeightStorage
from i2v_core.placement.streaming import staged, streamed
from i2v_core.placement.swap import all_tensors
from i2v_core.placement.transfer_blocks import packed
from i2v_core.units import KIB, MIB
from tests.emulated_cuda import CARD, emulated_cuda

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8])


class Kind(NamedTuple):
    """A tensor in a slab, maybe behind a gap, and maybe to be a block of its own."""

    elements: int
    dtype: torch.dtype
    behind_gap: bool
    alone: bool


def laid_out(kinds: list[Kind]) -> list[torch.Tensor]:
    """Return tensors of small numbers, in blocks of the device's allocator."""
    slab, end, tensors = torch.randint(0, 100, (64 * KIB,), dtype=torch.uint8), 0, list[torch.Tensor]()
    for kind in kinds:
        end += ALLOCATION_BYTES * kind.behind_gap
        size_bytes = kind.elements * kind.dtype.itemsize
        tensors.append(slab[end : end + size_bytes].view(kind.dtype))
        end += rounded_bytes(size_bytes)
    return tensors


@settings(suppress_health_check=[HealthCheck.too_slow])  # it measures the machine
@given(
    st.lists(st.builds(Kind, st.integers(1, 600), DTYPES, st.booleans(), st.booleans()), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_tensors_of_any_kind_arrive_unchanged(kinds: list[Kind], random: Random) -> None:
    given_tensors = list(zip(laid_out(kinds), (kind.alone for kind in kinds), strict=True))
    random.shuffle(given_tensors)
    tensors, alone = [tensor for tensor, _ in given_tensors], [single for _, single in given_tensors]
    made = packed(tensors, alone)
    found = dict(it for block in made for it in block.unpacked(block.on_host.clone()))
    assert len(found) == len(tensors)
    for place, tensor in enumerate(tensors):
        assert torch.equal(found[place], tensor)
        assert found[place].dtype == tensor.dtype
    assert all(len(block.tensors) == 1 for block in made if any(alone[place] for place in block.tensors))
    assert sum(rounded_bytes(it.on_host.nbytes) for it in made) == sum(rounded_bytes(it.nbytes) for it in tensors)


def test_staged_weights_are_one_block_up_to_its_limit() -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.GroupNorm(4, 64), nn.Conv2d(64, 8, 3))
    with emulated_cuda():
        weights = StoredWeights(layers, CARD, torch.float16, WeightStorage.AS_COMPUTED)
        with staged(layers, weights, pinned=True):
            blocks = packed([it.data for it in all_tensors(layers)], [False] * len(all_tensors(layers)))
    assert len(blocks) == 1


def test_a_block_is_no_larger_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    slab = torch.zeros(4 * MIB, dtype=torch.uint8)
    tensors = [slab[start : start + 512 * KIB] for start in range(0, 4 * MIB, 512 * KIB)]
    monkeypatch.setattr(transfer_blocks, "_MAX_BYTES", MIB)
    assert [len(it.tensors) for it in packed(tensors, [False] * 8)] == [2, 2, 2, 2]


def test_tensors_that_are_not_adjacent_are_copied_separately() -> None:
    slab = torch.zeros(8, 64)
    for tensors in ([torch.ones(3), torch.ones(4)], [slab[0], slab[7]], [slab[:2].T, slab[2:4].T]):
        made = packed(tensors, [False] * len(tensors))
        assert [len(it.tensors) for it in made] == [1, 1]


def test_the_weights_of_a_layer_call_take_one_copy() -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.GroupNorm(4, 64), nn.Linear(64, 8)).requires_grad_(False)
    with emulated_cuda() as card:
        with streamed(layers, CARD, torch.float32) as stream, stream.around((layers,)):
            assert all(card.holds(tensor) for tensor in all_tensors(layers))
            assert len({tensor.untyped_storage().data_ptr() for tensor in all_tensors(layers)}) == 1
            assert torch.isfinite(layers(torch.ones(1, 64, device=CARD))).all()
        assert not card.races
