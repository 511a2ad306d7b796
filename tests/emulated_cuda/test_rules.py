"""The emulated card: devices of tensors, refused calls, memory, and races."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from i2v_core.memory.meter import ALLOCATION_BYTES
from i2v_core.placement.offload import release_pinned_memory
from i2v_core.units import KIB

from . import CARD, emulated_cuda

HOST = torch.device("cpu")


def test_tensors_say_where_they_are() -> None:
    with emulated_cuda():
        there = torch.arange(6.0, device="cuda")
        assert there.device == CARD
        assert there.is_cuda
        for made in (there + 1, there.view(2, 3)[0], torch.zeros_like(there), torch.tensor([1.0], device=CARD)):
            assert made.device == CARD
        assert torch.ones(3).to(there).device == CARD
        assert torch.ones(3).to("cuda", torch.float16).device == CARD
        assert there.cpu().device == there.to("cpu").device == torch.ones(3).device == HOST
        assert torch.empty(3, device="meta").device.type == "meta"
        assert torch.equal(there.cpu(), torch.arange(6.0))
    assert there.device == HOST


def test_operands_on_two_devices_are_refused() -> None:
    with emulated_cuda():
        here, there = torch.ones(3), torch.ones(3, device=CARD)
        assert (there * torch.tensor(2.0)).device == CARD
        assert there[torch.tensor([0, 1])].device == CARD
        here[:2] = there[:2]
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([here, there]),
            lambda: nn.functional.linear(there, torch.ones(2, 3)),
            lambda: here[torch.tensor([0, 1], device=CARD)],
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_its_memory_has_a_limit() -> None:
    with emulated_cuda(limit_bytes=4 * KIB) as card:
        kept = torch.ones(600, device=CARD)
        assert card.used_bytes == torch.cuda.memory_allocated() == 5 * ALLOCATION_BYTES
        with pytest.raises(torch.OutOfMemoryError):
            torch.mul(kept, 2)
        assert card.used_bytes == 5 * ALLOCATION_BYTES
        torch.add(kept[:100], 1)
        assert torch.cuda.max_memory_allocated() == 6 * ALLOCATION_BYTES
        del kept
        assert card.used_bytes == 0


def test_pinned_memory_is_kept_until_it_is_released() -> None:
    with emulated_cuda() as card:
        pinned = torch.empty(1000, pin_memory=True)
        assert pinned.is_pinned()
        assert not torch.empty(1000).is_pinned()
        release_pinned_memory()
        assert card.pinned_bytes == pinned.nbytes
        del pinned
        assert card.pinned_bytes
        release_pinned_memory()
        assert not card.pinned_bytes


def test_a_copy_between_layouts_takes_memory_for_its_contiguous_form() -> None:
    with emulated_cuda() as card:
        there = torch.ones(16, 64, device=CARD)
        here = torch.empty(64, 16)
        card.reset_peak()
        here.T.copy_(there)
        assert card.peak_bytes == there.nbytes
        here.copy_(there.T)
        assert card.peak_bytes == 2 * there.nbytes


def test_a_read_that_does_not_wait_for_the_copy_is_a_race() -> None:
    for waits in (True, False):
        with emulated_cuda() as card:
            source, target = torch.ones(4, pin_memory=True), torch.empty(4, device=CARD)
            side = torch.cuda.Stream(CARD)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                target.copy_(source, non_blocking=True)
                copied = side.record_event()
            if waits:
                copied.wait()
            torch.add(target, 1)
            assert bool(card.races) != waits


def test_a_copy_into_memory_that_may_still_be_in_use_is_a_race() -> None:
    with emulated_cuda() as card:
        target = torch.empty(4, device=CARD)
        with torch.cuda.stream(torch.cuda.Stream(CARD)):
            target.copy_(torch.ones(4, pin_memory=True), non_blocking=True)
        assert "copy_ does not wait for empty" in card.races[0]


def test_memory_freed_while_another_stream_reads_it_is_a_race() -> None:
    with emulated_cuda() as card:
        source = torch.ones(4, device=CARD)
        side = torch.cuda.Stream(CARD)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            copy = source.clone()
        del source
        assert "it is freed does not wait for clone" in card.races[0]
        del copy


def test_the_host_must_wait_for_what_it_reads() -> None:
    for waits in (True, False):
        with emulated_cuda() as card:
            there, here = torch.ones(4, device=CARD), torch.empty(4, pin_memory=True)
            here.copy_(there, non_blocking=True)
            if waits:
                torch.cuda.synchronize()
            torch.add(here, 1)
            assert bool(card.races) != waits
            assert card.streams.waits == waits
