"""Cards that plans can be made for, by size."""

from __future__ import annotations

import pytest
import torch

from i2v_core.planning.cards import CARDS, SYSTEM_SHARE_BYTES, THIS_MACHINE
from i2v_core.units import GIB


def test_the_cards_are_those_that_people_have() -> None:
    assert list(CARDS) == ["6 GB", "8 GB", "12 GB", "16 GB", "24 GB"]
    assert THIS_MACHINE not in CARDS


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_its_size_less_the_systems_share(name: str) -> None:
    card = CARDS[name]
    assert card.free_bytes == int(name.removesuffix(" GB")) * GIB - SYSTEM_SHARE_BYTES
    assert card.facts.name == f"a card with {name}"
    assert torch.float32 not in card.facts.precisions[:2]
