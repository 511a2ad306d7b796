"""Graphics cards by their memory, to plan for one that is not in this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..memory.device import DeviceFacts
from ..units import GIB, MIB

THIS_MACHINE = "this machine"

SYSTEM_SHARE_BYTES = 768 * MIB
"""Memory that a card's system, desktop and driver use. An estimate: from nothing to more than a GiB is seen."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card of `gib` GiB, which are sold as GB."""

    gib: int

    @property
    def name(self) -> str:
        return f"{self.gib} GB"

    @property
    def free_bytes(self) -> int:
        return self.gib * GIB - SYSTEM_SHARE_BYTES

    @property
    def facts(self) -> DeviceFacts:
        """bf16 stands for fp16 on cards without it: both need the same memory."""
        precisions = (torch.bfloat16, torch.float16, torch.float32)
        return DeviceFacts(device="cuda", name=f"a card with {self.name}", precisions=precisions)


CARDS: Mapping[str, Card] = {card.name: card for card in map(Card, (6, 8, 12, 16, 24))}
"""By name."""
