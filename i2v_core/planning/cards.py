"""Graphics cards by their size, to plan for one that is not in this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..memory.device import DeviceFacts
from ..units import GIB, MIB

THIS_MACHINE = "this machine"

SYSTEM_SHARE_BYTES = 768 * MIB
"""What a card's system, desktop and driver keep of it. An estimate: from nothing to more than a GiB is seen."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card of `gib` GiB, which its box calls GB."""

    gib: int

    @property
    def name(self) -> str:
        return f"{self.gib} GB"

    @property
    def free_bytes(self) -> int:
        return self.gib * GIB - SYSTEM_SHARE_BYTES

    @property
    def facts(self) -> DeviceFacts:
        """bf16 and fp16 take the same memory, so that one stands for the other on cards which have only that."""
        precisions = (torch.bfloat16, torch.float16, torch.float32)
        return DeviceFacts(device="cuda", name=f"a card with {self.name}", precisions=precisions)


CARDS: Mapping[str, Card] = {card.name: card for card in map(Card, (6, 8, 12, 16, 24))}
"""By name."""
