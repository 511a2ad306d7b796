"""An emulated CUDA card, for tests on machines without one.

Its tensors are in host memory and computed on the CPU, but report a CUDA device, and CUDA's rules are checked: operands
must be on one device, memory is limited, copies need staging memory, and only waits order the work of streams.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from i2v_core.units import GIB

from .calls import Allocations, Calls
from .card import CARD, EmulatedCard

__all__ = ["CARD", "EmulatedCard", "emulated_cuda"]


@contextmanager
def emulated_cuda(limit_bytes: int = 8 * GIB) -> Generator[EmulatedCard]:
    """Make `torch.device("cuda")` an emulated card of `limit_bytes` within the context."""
    import diffusers.models.modeling_utils  # noqa: F401  # what it imports looks for kernels of the card that is there

    card = EmulatedCard(limit_bytes)
    allocations = Allocations(card)
    streams = card.streams
    there = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda *_: "an emulated card",
        "get_device_capability": lambda *_: (8, 0),
        "Stream": streams.new,
        "current_stream": lambda *_: streams.current,
        "stream": streams.use,
        "synchronize": lambda *_: streams.current.synchronize(),
        "memory_allocated": lambda *_: card.used_bytes,
        "memory_reserved": lambda *_: card.used_bytes,
        "max_memory_allocated": lambda *_: card.peak_bytes,
        "reset_peak_memory_stats": lambda *_: card.reset_peak(),
        "mem_get_info": lambda *_: (card.limit_bytes - card.used_bytes, card.limit_bytes),
        "empty_cache": lambda: None,
    }
    with ExitStack() as stack:
        for name, value in there.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_host_emptyCache", card.release_idle_pinned))
        stack.enter_context(allocations)
        stack.enter_context(Calls(card, allocations))
        yield card
