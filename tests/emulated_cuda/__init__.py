"""A CUDA card that is not there.

What lies on it lies in host memory in truth, and is worked out there, so the numbers are the CPU's. But tensors say
that they are on it, and CUDA's rules hold: what must be on one device is, memory has a limit, copies take what they
take, and work on streams is ordered by waits alone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from i2v_core.units import GIB

from .calls import Births, Calls
from .card import CARD, EmulatedCard

__all__ = ["CARD", "EmulatedCard", "emulated_cuda"]


@contextmanager
def emulated_cuda(limit_bytes: int = 8 * GIB) -> Generator[EmulatedCard]:
    """While the context lasts, `torch.device("cuda")` is a card of `limit_bytes`."""
    import diffusers.models.modeling_utils  # noqa: F401  # what it imports looks for kernels of the card that is there

    card = EmulatedCard(limit_bytes)
    births = Births(card)
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
        stack.enter_context(mock.patch.object(torch._C, "_host_emptyCache", card.give_idle_pinned_back))
        stack.enter_context(births)
        stack.enter_context(Calls(card, births))
        yield card
