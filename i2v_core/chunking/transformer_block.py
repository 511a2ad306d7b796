"""Transformer blocks that update their tokens in place."""

from __future__ import annotations

from typing import Any

import torch

from .workspace import FEED_FORWARD_CHUNKS


def apply_block(
    block: Any, tokens: torch.Tensor, context: torch.Tensor | None, attention_kwargs: dict[str, Any]
) -> None:
    """Run a layer-norm `BasicTransformerBlock` on contiguous `tokens` (N, L, width), in place.

    The second attention attends to `context` (N, T, context width), or to the tokens themselves if it is None. The
    feed-forward runs in chunks of rows, so that GEGLU takes no more memory than attention does.
    """
    tokens.add_(block.attn1(block.norm1(tokens), **attention_kwargs))
    tokens.add_(block.attn2(block.norm2(tokens), encoder_hidden_states=context, **attention_kwargs))
    _feed_forward(block.ff, block.norm3, tokens)


def apply_temporal_block(block: Any, tokens: torch.Tensor, context_BTD: torch.Tensor) -> None:
    """Run a `TemporalBasicTransformerBlock` on contiguous `tokens` (B × P, F, width), in place.

    Legend: B batch, P pixels, F frames, T context tokens, D their width.
    """
    assert block.is_res, "a block of another inner width cannot update its tokens in place"
    _feed_forward(block.ff_in, block.norm_in, tokens)
    tokens.add_(block.attn1(block.norm1(tokens)))
    if block.attn2 is not None:
        batch, *context = context_BTD.shape
        pixel_context = context_BTD[:, None].expand(batch, len(tokens) // batch, *context).flatten(0, 1)
        tokens.add_(block.attn2(block.norm2(tokens), encoder_hidden_states=pixel_context))
        del pixel_context
    _feed_forward(block.ff, block.norm3, tokens)


def _feed_forward(layer: Any, norm: Any, tokens: torch.Tensor) -> None:
    for rows in tokens.view(-1, tokens.shape[-1]).chunk(FEED_FORWARD_CHUNKS):
        rows.add_(layer(norm(rows)))
