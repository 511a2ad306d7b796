"""Transformer blocks that work in place on their tokens."""

from __future__ import annotations

from typing import Any

import torch

from .workspace import FEED_FORWARD_PIECES


def apply_block(
    block: Any, tokens: torch.Tensor, context: torch.Tensor | None, attention_kwargs: dict[str, Any]
) -> None:
    """Runs a layer-norm `BasicTransformerBlock` on `tokens` (N, L, width), contiguous, which take the result.

    `context` (N, T, context width) is what the second attention looks at; without it, the tokens themselves. The
    feed-forward runs in pieces of rows, so that GEGLU takes no more memory than attention did.
    """
    tokens.add_(block.attn1(block.norm1(tokens), **attention_kwargs))
    tokens.add_(block.attn2(block.norm2(tokens), encoder_hidden_states=context, **attention_kwargs))
    _feed_forward(block.ff, block.norm3, tokens)


def apply_temporal_block(block: Any, tokens: torch.Tensor, context_BTD: torch.Tensor) -> None:
    """Runs a `TemporalBasicTransformerBlock` on `tokens` (B × P, F, width), contiguous, which take the result.

    Legend: B batch, P pixels, F frames, T context tokens, D their width.
    """
    assert block.is_res, "a block of another inner width replaces its tokens"
    _feed_forward(block.ff_in, block.norm_in, tokens)
    tokens.add_(block.attn1(block.norm1(tokens)))
    if block.attn2 is not None:
        batch, *context = context_BTD.shape
        of_pixels = context_BTD[:, None].expand(batch, len(tokens) // batch, *context).flatten(0, 1)
        tokens.add_(block.attn2(block.norm2(tokens), encoder_hidden_states=of_pixels))
        del of_pixels
    _feed_forward(block.ff, block.norm3, tokens)


def _feed_forward(layer: Any, norm: Any, tokens: torch.Tensor) -> None:
    for rows in tokens.view(-1, tokens.shape[-1]).chunk(FEED_FORWARD_PIECES):
        rows.add_(layer(norm(rows)))
