"""Core's Kandinsky 5, Lite and Pro, in chunks of tokens, equal to core's own forward.

All but self-attention treats a video's tokens one by one, and that needs no more of the others than keys and values. So
these are made for all tokens, and everything else runs on some tokens at a time and updates the hidden state in place.
The text blocks run as they are: their tokens are few.

Shape legend: B batch, L tokens, n tokens of a chunk, D width, H heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.kandinsky5 import model as core
from torch import Tensor, nn

from .block_input import BlockInput
from .calls import CallState
from .model import Patch, is_plain

_BLOCKS = "visual_transformer_blocks"
_ALL = slice(None)


class Kandinsky5:
    """`model.NativeModel` for core's Kandinsky 5 models of videos and images."""

    name = "Kandinsky 5"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.Kandinsky5)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        return ("text_transformer_blocks", _BLOCKS)

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        before = None
        for index, block in enumerate(model.visual_transformer_blocks):
            if type(block) is core.TransformerDecoderBlock:
                source = BlockInput(model=model, plain=core.Kandinsky5, loop="forward_orig", before=before, ours=_Block)
                yield Patch(f"{_BLOCKS}.{index}", block, _Block(block, state, source))
            before = block


@dataclass(frozen=True, slots=True, eq=False)
class _Sublayer:
    """The modulated input of a block's sublayer, and its gated sum with the hidden state, for some tokens."""

    hidden_BLD: Tensor
    norm: nn.Module
    shift_B1D: Tensor
    scale_B1D: Tensor
    gate_B1D: Tensor

    def input(self, tokens: slice) -> Tensor:
        return core.apply_scale_shift_norm(self.norm, self.hidden_BLD[:, tokens], self.scale_B1D, self.shift_B1D)

    def add(self, tokens: slice, output_BnD: Tensor) -> None:
        self.hidden_BLD[:, tokens].addcmul_(self.gate_B1D, output_BnD)


class _Block:
    """`TransformerDecoderBlock.forward`, a chunk of tokens at a time."""

    def __init__(self, block: Any, state: CallState, source: BlockInput) -> None:
        self._block, self._state, self._source = block, state, source

    def __call__(
        self,
        visual_embed: Tensor,
        text_embed: Tensor,
        time_embed: Tensor,
        freqs: Tensor,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
    ) -> Tensor:
        block = self._block
        if not self._state.chunked:
            return core.TransformerDecoderBlock.forward(
                block, visual_embed, text_embed, time_embed, freqs, transformer_options=transformer_options
            )
        hidden = self._source.owned(visual_embed, transformer_options)
        norms = (block.self_attention_norm, block.cross_attention_norm, block.feed_forward_norm)
        modulations = torch.chunk(block.visual_modulation(time_embed), 3, dim=-1)
        attention, cross, feed_forward = (
            _Sublayer(hidden, norm, *core.get_shift_scale_gate(it)) for norm, it in zip(norms, modulations, strict=True)
        )
        self._self_attention(attention, freqs, transformer_options)
        self._cross_attention(cross, text_embed, transformer_options)
        self._feed_forward(feed_forward)
        return hidden

    def _self_attention(self, sublayer: _Sublayer, freqs: Tensor, transformer_options: dict[str, Any]) -> None:
        attention = self._block.self_attention
        if not is_plain(attention, core.SelfAttention):  # replaced by another node, which may look at all tokens
            sublayer.add(_ALL, attention(sublayer.input(_ALL), freqs, transformer_options=transformer_options))
            return
        batch, total, width = sublayer.hidden_BLD.shape
        heads = (attention.num_heads, attention.head_dim)
        keys_BLHd, values_BLHd = (sublayer.hidden_BLD.new_empty(batch, total, *heads) for _ in range(2))
        row_bytes = batch * width * sublayer.hidden_BLD.element_size()
        modules = (attention.to_key, attention.key_norm, attention.to_value)
        with self._state.tokens("keys", *modules, total=total, unit_bytes=8 * row_bytes) as chunks:
            for tokens in chunks:
                normed = sublayer.input(tokens)
                values_BLHd[:, tokens] = attention.to_value(normed).unflatten(-1, heads)
                keys_BLHd[:, tokens] = attention._compute_qk(
                    normed, freqs[:, tokens], attention.to_key, attention.key_norm
                )
                del normed
        modules = (attention.to_query, attention.query_norm, attention.out_layer)
        with self._state.tokens("queries", *modules, total=total, unit_bytes=8 * row_bytes) as chunks:
            for tokens in chunks:
                query = attention._compute_qk(
                    sublayer.input(tokens), freqs[:, tokens], attention.to_query, attention.query_norm
                )
                attended = core.attention(
                    query, keys_BLHd, values_BLHd, attention.num_heads, transformer_options=transformer_options
                )
                del query
                sublayer.add(tokens, attention.out_layer(attended))
                del attended

    def _cross_attention(self, sublayer: _Sublayer, text: Tensor, transformer_options: dict[str, Any]) -> None:
        attention = self._block.cross_attention
        if not is_plain(attention, core.CrossAttention):
            sublayer.add(_ALL, attention(sublayer.input(_ALL), text, transformer_options=transformer_options))
            return
        heads = (attention.num_heads, attention.head_dim)
        modules = (attention.to_key, attention.key_norm, attention.to_value)
        with self._state.tokens("context", *modules, total=text.shape[1], unit_bytes=1) as _:
            keys_BLHd = attention.key_norm(attention.to_key(text).unflatten(-1, heads))
            values_BLHd = attention.to_value(text).unflatten(-1, heads)
        batch, total, width = sublayer.hidden_BLD.shape
        unit_bytes = 3 * batch * width * sublayer.hidden_BLD.element_size()
        modules = (attention.to_query, attention.query_norm, attention.out_layer)
        with self._state.tokens("cross_attention", *modules, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                query = attention.query_norm(attention.to_query(sublayer.input(tokens)).unflatten(-1, heads))
                attended = core.attention(
                    query, keys_BLHd, values_BLHd, attention.num_heads, transformer_options=transformer_options
                )
                del query
                sublayer.add(tokens, attention.out_layer(attended))
                del attended

    def _feed_forward(self, sublayer: _Sublayer) -> None:
        layer = self._block.feed_forward
        if not is_plain(layer, core.FeedForward):
            sublayer.add(_ALL, layer(sublayer.input(_ALL)))
            return
        batch, total, width = sublayer.hidden_BLD.shape
        unit_bytes = batch * (width + 2 * layer.in_layer.out_features) * sublayer.hidden_BLD.element_size()
        with self._state.tokens("feed_forward", layer, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                sublayer.add(tokens, layer(sublayer.input(tokens)))


MODEL = Kandinsky5()
