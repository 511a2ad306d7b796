"""A single block, which runs attention and feed-forward side by side on text and image in one."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.flux import layers
from torch import Tensor

from ..calls import CallState
from ..fused_linear import linear_parts, linear_rows
from .hidden_state import Segments, add_gated, modulated, row_bytes, within_fp16
from .joint_attention import ROWS_PER_TOKEN, JointAttention, needs_all_tokens


class SingleBlock:
    """`SingleStreamBlock.forward`, a chunk of tokens at a time."""

    def __init__(self, block: Any, state: CallState) -> None:
        self._block, self._state = block, state

    def __call__(
        self,
        x: Tensor,
        vec: Tensor,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims: Segments = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
    ) -> Tensor:
        block = self._block
        if not self._state.chunked or needs_all_tokens(transformer_options, block.norm):
            return layers.SingleStreamBlock.forward(
                block, x, vec, pe, attn_mask, modulation_dims, transformer_options=transformer_options
            )
        modulation, _ = block.modulation(vec)
        with self._state.weights("single_block", block.linear1, block.norm, block.linear2):
            joint = JointAttention.empty(x, block.num_heads, x.shape[1], pe, attn_mask)
            self._write_keys(x, modulation, modulation_dims, joint)
            self._update(x, modulation, modulation_dims, joint, transformer_options)
            del joint
        return within_fp16(x)

    def _write_keys(self, hidden: Tensor, modulation: Any, segments: Segments, joint: JointAttention) -> None:
        block, width = self._block, self._block.hidden_size
        unit_bytes = ROWS_PER_TOKEN * row_bytes(hidden)
        with self._state.tokens("keys", total=hidden.shape[1], unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                normed = modulated(hidden, block.pre_norm, modulation, segments, tokens)
                made = linear_rows(block.linear1, normed, slice(width, 3 * width))
                del normed
                joint.write(tokens, block.norm, made)
                del made

    def _update(
        self,
        hidden: Tensor,
        modulation: Any,
        segments: Segments,
        joint: JointAttention,
        transformer_options: dict[str, Any],
    ) -> None:
        """Attention and feed-forward, side by side, which the second linear layer takes together."""
        block, width = self._block, self._block.hidden_size
        parts = (slice(width), slice(3 * width, None))
        unit_bytes = row_bytes(hidden) * (ROWS_PER_TOKEN * width + block.mlp_hidden_dim) // width
        with self._state.tokens("queries", total=hidden.shape[1], unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                normed = modulated(hidden, block.pre_norm, modulation, segments, tokens)
                query, inner = linear_parts(block.linear1, normed, *parts)
                del normed
                inner = block.mlp_act(inner)
                query = joint.query(block.norm, query)
                attended = joint.attend(tokens, query, transformer_options)
                del query
                both = torch.cat((attended, inner), 2)
                del attended, inner
                made = block.linear2(both)
                del both
                add_gated(hidden, made, modulation, segments, tokens)
                del made
