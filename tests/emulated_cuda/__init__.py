"""CUDA's rules without a card: see `card`."""

from .card import CARD, EmulatedCard, emulated_cuda

__all__ = ["CARD", "EmulatedCard", "emulated_cuda"]
