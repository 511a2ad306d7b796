"""Core's Wan 2.1 and 2.2 in chunks of tokens, equal to core's own forward.

All but self-attention treats tokens one by one, and that needs no more of the others than keys and values. So these are
made for all tokens, and everything else runs on some tokens at a time and updates the hidden state in place.

Shape legend: B batch, L tokens, n tokens of a chunk, D width, S time steps of a call (1, or one for each latent frame).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management as management
import torch
from comfy.ldm.wan import model as core
from torch import Tensor, nn

from .calls import CallState
from .held_weights import held
from .model import Patch, is_plain

BLOCK_LISTS = ("blocks",)
_HELD_BY_NOBODY = (core.WanModel, core.CameraWanModel)
"""Models that keep no reference to the hidden state that they hand to a block, so that it may be updated in place."""


class Wan:
    """`model.NativeModel` for every core model whose blocks are `WanAttentionBlock`s."""

    name = "Wan"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.WanModel)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        return BLOCK_LISTS

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        """Replacement forwards by their path below the model; parts that are not core's own are left out."""
        in_place = type(model) in _HELD_BY_NOBODY
        for index, block in enumerate(model.blocks):
            if type(block) is core.WanAttentionBlock:
                yield Patch(f"blocks.{index}", block, _Block(block, state, in_place=in_place))
        if type(model.head) is core.Head:
            yield Patch("head", model.head, _Head(model.head, state))
        yield Patch("patch_embedding", model.patch_embedding, _PatchEmbedding(model.patch_embedding, state))


class _Block:
    """`WanAttentionBlock.forward`, a chunk of tokens at a time."""

    def __init__(self, block: Any, state: CallState, *, in_place: bool) -> None:
        self._block, self._state, self._in_place = block, state, in_place

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
        patches = transformer_options.get("patches", {})
        modulation = _modulation(self._block.modulation, e, x)
        hidden = self._own(x, transformer_options)
        if "attn1_patch" in patches or not is_plain(self._block.self_attn, core.WanSelfAttention):
            self._whole_self_attention(hidden, modulation, freqs, transformer_options)
        else:
            self._self_attention(hidden, modulation, freqs, transformer_options)
        self._cross_attention(hidden, context, context_img_len, transformer_options)
        for patch in patches.get("attn2_patch", ()):
            hidden = patch({"x": hidden, "transformer_options": transformer_options})
        self._feed_forward(hidden, modulation)
        return hidden

    def _own(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """The hidden state to update in place: a copy where somebody else may hold it."""
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        watched = "double_block" in transformer_options.get("patches", {}) or replaced
        if self._in_place and not watched:
            return x.contiguous()
        return x.clone(memory_format=torch.contiguous_format)

    def _self_attention(
        self, hidden: Tensor, modulation: tuple[Tensor, ...], freqs: Tensor, transformer_options: dict[str, Any]
    ) -> None:
        attention, norm = self._block.self_attn, self._block.norm1
        batch, total, width = hidden.shape
        heads = (attention.num_heads, attention.head_dim)
        keys, values = torch.empty_like(hidden), torch.empty_like(hidden)
        row_bytes = batch * width * hidden.element_size()
        modules = (attention.k, attention.norm_k, attention.v)
        with self._state.tokens("keys", *modules, total=total, unit_bytes=5 * row_bytes) as chunks:
            for tokens in chunks:
                normed = _modulated(hidden, norm, modulation[0], modulation[1], tokens)
                values[:, tokens] = attention.v(normed)
                key = attention.norm_k(attention.k(normed))
                del normed
                key = core.apply_rope1(key.view(batch, -1, *heads), freqs[:, tokens])
                keys[:, tokens] = key.flatten(2)
                del key
        modules = (attention.q, attention.norm_q, attention.o)
        with self._state.tokens("queries", *modules, total=total, unit_bytes=5 * row_bytes) as chunks:
            for tokens in chunks:
                query = attention.norm_q(attention.q(_modulated(hidden, norm, modulation[0], modulation[1], tokens)))
                query = core.apply_rope1(query.view(batch, -1, *heads), freqs[:, tokens]).flatten(2)
                query = core.optimized_attention(
                    query, keys, values, heads=attention.num_heads, transformer_options=transformer_options
                )
                hidden[:, tokens].addcmul_(attention.o(query), _rows(modulation[2], tokens, total))
                del query

    def _whole_self_attention(
        self, hidden: Tensor, modulation: tuple[Tensor, ...], freqs: Tensor, transformer_options: dict[str, Any]
    ) -> None:
        """Core's own call: a patch wants to see all tokens, or another node has replaced the layer."""
        everything = slice(0, hidden.shape[1])
        normed = _modulated(hidden, self._block.norm1, modulation[0], modulation[1], everything)
        attended = self._block.self_attn(normed, freqs, transformer_options=transformer_options)
        hidden.addcmul_(attended, _rows(modulation[2], everything, hidden.shape[1]))

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
        pairs = [_keys_and_values(self._state, *source) for source in sources]
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

    def _feed_forward(self, hidden: Tensor, modulation: tuple[Tensor, ...]) -> None:
        ffn, norm = self._block.ffn, self._block.norm2
        batch, total, width = hidden.shape
        unit_bytes = batch * (width + 2 * self._block.ffn_dim) * hidden.element_size()
        with self._state.tokens("feed_forward", *ffn, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                made = ffn(_modulated(hidden, norm, modulation[3], modulation[4], tokens))
                hidden[:, tokens].addcmul_(made, _rows(modulation[5], tokens, total))
                del made


class _Head:
    """`Head.forward`, a chunk of tokens at a time."""

    def __init__(self, head: Any, state: CallState) -> None:
        self._head, self._state = head, state

    def __call__(self, x: Tensor, e: Tensor) -> Tensor:
        if not self._state.chunked:
            return core.Head.forward(self._head, x, e)
        batch, total, width = x.shape
        out = x.new_empty(batch, total, self._head.head.out_features)
        shift, scale = _modulation(self._head.modulation, e, x, rows=2)
        unit_bytes = 3 * batch * width * x.element_size()
        with self._state.tokens("head", self._head.head, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                out[:, tokens] = self._head.head(_modulated(x, self._head.norm, shift, scale, tokens))
        return out


class _PatchEmbedding:
    """The embedding of latents as patches, a latent frame at a time.

    Core embeds all frames in fp32 and transposes the result, which takes three times the hidden state. This writes the
    tokens as the blocks want them, in the precision that core casts them to.
    """

    def __init__(self, embedding: Any, state: CallState) -> None:
        self._embedding, self._state = embedding, state
        self._stock: Callable[[Any, Tensor], Tensor] = type(embedding).forward

    def __call__(self, latents_BCTHW: Tensor) -> Tensor:
        if not self._state.chunked:
            return self._stock(self._embedding, latents_BCTHW)
        step = self._embedding.kernel_size[0]
        out: Tensor | None = None
        count = latents_BCTHW.shape[2] // step
        with held([self._embedding], latents_BCTHW.device, latents_BCTHW.dtype):
            for frame in range(count):
                self._state.on_chunk()
                latents = latents_BCTHW[:, :, frame * step : (frame + 1) * step]
                tokens_BDhw = self._stock(self._embedding, latents)[:, :, 0]
                if out is None:
                    batch, width, height, length = tokens_BDhw.shape
                    out = tokens_BDhw.new_empty(batch, count, height, length, width, dtype=self._state.dtype)
                out[:, frame] = tokens_BDhw.permute(0, 2, 3, 1)
                del tokens_BDhw
        assert out is not None
        return out.permute(0, 4, 1, 2, 3)


def _modulation(own: Tensor, e: Tensor, like: Tensor, rows: int = 6) -> tuple[Tensor, ...]:
    """The modulation's rows (B, S, D) as core makes them of a call's time embedding."""
    own = management.cast_to(own, dtype=like.dtype, device=like.device)
    if rows == 2:  # the head gets the embedding without rows
        joined = own + e.unsqueeze(1) if e.ndim < 3 else own.unsqueeze(0) + e.unsqueeze(2)
        return joined.chunk(2, dim=1) if e.ndim < 3 else joined.unbind(2)
    return (own + e).chunk(rows, dim=1) if e.ndim < 4 else (own.unsqueeze(0) + e).unbind(2)


def _rows(modulation_BSD: Tensor, tokens: slice, total: int) -> Tensor:
    """A row of the modulation for some tokens, as `repeat_e` of core makes it for all of them."""
    steps = modulation_BSD.shape[1]
    repeats = total // steps if steps > 1 else 1
    if repeats == 1:
        return modulation_BSD if steps == 1 else modulation_BSD[:, tokens]
    if repeats * steps != total:
        repeats += 1
    first, last = tokens.start // repeats, -(-tokens.stop // repeats)
    rows = torch.repeat_interleave(modulation_BSD[:, first:last], repeats, dim=1)
    return rows[:, tokens.start - first * repeats : tokens.stop - first * repeats]


def _modulated(hidden: Tensor, norm: nn.Module, shift: Tensor, scale: Tensor, tokens: slice) -> Tensor:
    """Some tokens (B, n, D), normalised, scaled and shifted."""
    total = hidden.shape[1]
    return torch.addcmul(_rows(shift, tokens, total), norm(hidden[:, tokens]), 1 + _rows(scale, tokens, total))


def _keys_and_values(
    state: CallState, context: Tensor, to_key: nn.Module, norm: nn.Module, to_value: nn.Module
) -> tuple[Tensor, Tensor]:
    """Keys and values of a context (B, L, D), made once for all chunks of queries."""
    rows = context.shape[1]
    with state.tokens("context", to_key, norm, to_value, total=rows, unit_bytes=1) as _:
        return norm(to_key(context)), to_value(context)


MODEL = Wan()
