"""Wan's transformer blocks in chunks of tokens, equal to core's own forward.

All but self-attention treats tokens one by one, and that needs no more of the others than keys and values. So these are
made for all tokens, and everything else runs on some tokens at a time and updates the hidden state in place.

Shape legend: B batch, L tokens, n tokens of a chunk, D width, S time steps of a call (1, or one for each latent frame).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.wan import model as core
from torch import Tensor, nn

from ..block_input import is_watched
from ..calls import CallState
from ..model import is_plain
from .modulation import modulated, modulation, rows_of
from .speech import add_speech, is_one_speakers


class Block:
    """`WanAttentionBlock.forward`, a chunk of tokens at a time.

    Args:
        may_overwrite: whether nobody else will read a call's hidden state, so that it may be updated in place.
    """

    def __init__(self, block: Any, state: CallState, *, may_overwrite: Callable[[], bool]) -> None:
        self._block, self._state, self._may_overwrite = block, state, may_overwrite

    def __call__(
        self,
        x: Tensor,
        e: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_img_len: int | None = 257,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
    ) -> Tensor:
        if not self._state.chunked:
            return core.WanAttentionBlock.forward(
                self._block, x, e, freqs, context, context_img_len, transformer_options=transformer_options
            )
        return self.run(self.own(x, transformer_options), e, freqs, context, context_img_len, transformer_options)

    def own(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """The hidden state to update in place: a copy where somebody else may hold it."""
        return x.contiguous() if self._may_overwrite() and not is_watched(transformer_options) else _copy(x)

    def run(
        self,
        hidden: Tensor,
        e: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_img_len: int | None = 257,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
    ) -> Tensor:
        """The block on a hidden state that is updated in place, or replaced by another node's patch."""
        rows = modulation(self._block.modulation, e, hidden)
        self.attend(hidden, rows, freqs, context, context_img_len, transformer_options)
        hidden = self._patched(hidden, transformer_options)
        self.feed_forward(hidden, rows)
        return hidden

    def _patched(self, hidden: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """The hidden state after the patches between attention and feed-forward; a copy, since they may hold theirs."""
        held = False
        for patch in transformer_options.get("patches", {}).get("attn2_patch", ()):
            if not is_one_speakers(patch, hidden, transformer_options):
                hidden, held = patch({"x": hidden, "transformer_options": transformer_options}), True
                continue
            hidden, held = _copy(hidden) if held else hidden, False
            add_speech(self._state, patch, hidden, transformer_options)
        return _copy(hidden) if held else hidden

    def attend(
        self,
        hidden: Tensor,
        rows: tuple[Tensor, ...],
        freqs: Tensor,
        context: Tensor,
        context_img_len: int | None,
        transformer_options: dict[str, Any],
    ) -> None:
        """Add both attentions."""
        patches = transformer_options.get("patches", {})
        if "attn1_patch" in patches or not is_plain(self._block.self_attn, core.WanSelfAttention):
            self._whole_self_attention(hidden, rows, freqs, transformer_options)
        else:
            self._self_attention(hidden, rows, freqs, transformer_options)
        self._cross_attention(hidden, context, context_img_len, transformer_options)

    def feed_forward(self, hidden: Tensor, rows: tuple[Tensor, ...]) -> None:
        """Add the feed-forward layers."""
        ffn, norm = self._block.ffn, self._block.norm2
        batch, total, width = hidden.shape
        unit_bytes = batch * (width + 2 * self._block.ffn_dim) * hidden.element_size()
        with self._state.tokens("feed_forward", *ffn, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                made = ffn(modulated(hidden, norm, rows[3], rows[4], tokens))
                hidden[:, tokens].addcmul_(made, rows_of(rows[5], tokens, total))
                del made

    def _self_attention(
        self, hidden: Tensor, rows: tuple[Tensor, ...], freqs: Tensor, transformer_options: dict[str, Any]
    ) -> None:
        attention, norm = self._block.self_attn, self._block.norm1
        batch, total, width = hidden.shape
        heads = (attention.num_heads, attention.head_dim)
        keys, values = torch.empty_like(hidden), torch.empty_like(hidden)
        row_bytes = batch * width * hidden.element_size()
        modules = (attention.k, attention.norm_k, attention.v)
        with self._state.tokens("keys", *modules, total=total, unit_bytes=5 * row_bytes) as chunks:
            for tokens in chunks:
                normed = modulated(hidden, norm, rows[0], rows[1], tokens)
                values[:, tokens] = attention.v(normed)
                key = attention.norm_k(attention.k(normed))
                del normed
                key = core.apply_rope1(key.view(batch, -1, *heads), freqs[:, tokens])
                keys[:, tokens] = key.flatten(2)
                del key
        modules = (attention.q, attention.norm_q, attention.o)
        with self._state.tokens("queries", *modules, total=total, unit_bytes=5 * row_bytes) as chunks:
            for tokens in chunks:
                query = attention.norm_q(attention.q(modulated(hidden, norm, rows[0], rows[1], tokens)))
                query = core.apply_rope1(query.view(batch, -1, *heads), freqs[:, tokens]).flatten(2)
                query = core.optimized_attention(
                    query, keys, values, heads=attention.num_heads, transformer_options=transformer_options
                )
                hidden[:, tokens].addcmul_(attention.o(query), rows_of(rows[2], tokens, total))
                del query

    def _whole_self_attention(
        self, hidden: Tensor, rows: tuple[Tensor, ...], freqs: Tensor, transformer_options: dict[str, Any]
    ) -> None:
        """Core's own call: a patch wants to see all tokens, or another node has replaced the layer."""
        everything = slice(0, hidden.shape[1])
        normed = modulated(hidden, self._block.norm1, rows[0], rows[1], everything)
        attended = self._block.self_attn(normed, freqs, transformer_options=transformer_options)
        hidden.addcmul_(attended, rows_of(rows[2], everything, hidden.shape[1]))

    def _cross_attention(
        self,
        hidden: Tensor,
        context: Tensor,
        context_img_len: int | None,
        transformer_options: dict[str, Any],
    ) -> None:
        attention, norm = self._block.cross_attn, self._block.norm3
        if is_plain(attention, core.WanT2VCrossAttention):
            sources = [(context, attention.k, attention.norm_k, attention.v)]
        elif is_plain(attention, core.WanI2VCrossAttention):
            image, text = context[:, :context_img_len], context[:, context_img_len:]
            sources = [
                (image, attention.k_img, attention.norm_k_img, attention.v_img),
                (text, attention.k, attention.norm_k, attention.v),
            ]
        else:  # replaced by another node, which may treat tokens by their place
            hidden.add_(
                attention(
                    norm(hidden), context, context_img_len=context_img_len, transformer_options=transformer_options
                )
            )
            return
        pairs = [keys_and_values(self._state, *source) for source in sources]
        batch, total, width = hidden.shape
        unit_bytes = 4 * batch * width * hidden.element_size()
        modules = (attention.q, attention.norm_q, attention.o)
        with self._state.tokens("cross_attention", *modules, norm, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                query = attention.norm_q(attention.q(norm(hidden[:, tokens])))
                attended = self._attended(query, pairs[-1], transformer_options)
                if len(pairs) > 1:  # the picture's part is added to the text's
                    attended = attended + self._attended(query, pairs[0], transformer_options)
                del query
                hidden[:, tokens].add_(attention.o(attended))
                del attended

    def _attended(
        self, query: Tensor, keys_and_values: tuple[Tensor, Tensor], transformer_options: dict[str, Any]
    ) -> Tensor:
        heads = self._block.cross_attn.num_heads
        return core.optimized_attention(query, *keys_and_values, heads=heads, transformer_options=transformer_options)


def _copy(hidden: Tensor) -> Tensor:
    return hidden.clone(memory_format=torch.contiguous_format)


def keys_and_values(
    state: CallState, context: Tensor, to_key: nn.Module, norm: nn.Module, to_value: nn.Module
) -> tuple[Tensor, Tensor]:
    """Keys and values of a context (B, L, D), made once for all chunks of queries."""
    rows = context.shape[1]
    with state.tokens("context", to_key, norm, to_value, total=rows, unit_bytes=1) as _:
        return norm(to_key(context)), to_value(context)
