"""Reading and updating some tokens of a hidden state, with core's modulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from comfy.ldm.flux import layers
from torch import Tensor, nn

Segments: TypeAlias = Sequence[tuple[int, int | None, int]] | None
"""Runs of tokens (from, to, row of the modulation); None: all tokens have the one row that there is."""


def row_bytes(hidden: Tensor) -> int:
    """Bytes of one token of the hidden state, over the whole batch."""
    return hidden.shape[0] * hidden.shape[2] * hidden.element_size()


def _within(segments: Segments, tokens: slice) -> Segments:
    """The segments of some tokens, counted from the first of these."""
    if segments is None:
        return None
    ends = [(start, tokens.stop if stop is None else min(stop, tokens.stop), row) for start, stop, row in segments]
    return [
        (max(start, tokens.start) - tokens.start, stop - tokens.start, row)
        for start, stop, row in ends
        if max(start, tokens.start) < stop
    ]


def modulated(hidden: Tensor, norm: nn.Module, modulation: Any, segments: Segments, tokens: slice) -> Tensor:
    """Some tokens (B, n, D), normalised, scaled and shifted."""
    normed = norm(hidden[:, tokens])
    return layers.apply_mod(normed, 1 + modulation.scale, modulation.shift, _within(segments, tokens))


def add_gated(hidden: Tensor, made: Tensor, modulation: Any, segments: Segments, tokens: slice) -> None:
    """Adds a layer's result to some tokens, in place."""
    hidden[:, tokens].add_(layers.apply_mod(made, modulation.gate, None, _within(segments, tokens)))


def within_fp16(hidden: Tensor) -> Tensor:
    """The hidden state with overflows replaced, as core's blocks do in fp16."""
    if hidden.dtype != torch.float16:
        return hidden
    return torch.nan_to_num(hidden, nan=0.0, posinf=65504, neginf=-65504)
