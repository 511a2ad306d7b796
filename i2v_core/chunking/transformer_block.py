"""A transformer block that works in place on its tokens."""

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
    for rows in tokens.view(-1, tokens.shape[-1]).chunk(FEED_FORWARD_PIECES):
        rows.add_(block.ff(block.norm3(rows)))
