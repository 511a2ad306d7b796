"""Core's CogVideoX 1.0 and 1.5 in chunks of tokens, equal to core's own forward.

Text and image tokens attend as one sequence, text first. All but that attention treats tokens one by one, and it needs
no more of the others than keys and values. So these are made for all tokens, and everything else runs on some tokens of
the sequence at a time and updates both hidden states in place.

Shape legend: B batch, S tokens of the sequence, n tokens of a chunk, D width, H heads, d width of a head, T latent
frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.cogvideo import model as core
from torch import Tensor, nn

from .block_input import BlockInput
from .calls import TOKEN_MULTIPLE, CallState
from .model import Patch, is_plain


class CogVideoX:
    """`model.NativeModel` for core's CogVideoX, and what is made of it (Fun, VOID)."""

    name = "CogVideoX"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.CogVideoXTransformer3DModel)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        return ("blocks",)

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        before = None
        for index, block in enumerate(model.blocks):
            if type(block) is core.CogVideoXBlock:
                source = BlockInput(
                    model=model,
                    plain=core.CogVideoXTransformer3DModel,
                    loop="_forward",
                    before=before,
                    ours=_Block,
                )
                yield Patch(f"blocks.{index}", block, _Block(block, state, source))
            before = block
        if type(model.norm_out) is core.CogVideoXAdaLayerNorm:
            yield Patch("norm_out", model.norm_out, _LastNorm(model.norm_out, state))
        if type(model.patch_embed) is core.CogVideoXPatchEmbed:
            yield Patch("patch_embed", model.patch_embed, _PatchEmbedding(model.patch_embed, state))


@dataclass(frozen=True, slots=True, eq=False)
class _Stream:
    """The text's or the image's tokens, and their modulation."""

    hidden_BLD: Tensor
    first: int
    """Place of the first token in the joint sequence."""
    shift_B1D: Tensor
    scale_B1D: Tensor
    gate_B1D: Tensor


class _Sublayer:
    """The modulated input of a block's sublayer, and its gated sum with the hidden states, for some tokens."""

    def __init__(self, norm: Any, text_BLD: Tensor, image_BLD: Tensor, time_embedding: Tensor) -> None:
        rows = [it[:, None] for it in norm.linear(norm.silu(time_embedding)).chunk(6, dim=1)]
        self.norm: nn.Module = norm.norm
        self.text_length = text_BLD.shape[1]
        self.total = self.text_length + image_BLD.shape[1]
        self._streams = (_Stream(text_BLD, 0, *rows[3:]), _Stream(image_BLD, self.text_length, *rows[:3]))
        self._like = image_BLD

    def tokens(
        self, state: CallState, kind: str, *modules: nn.Module, rows: int
    ) -> AbstractContextManager[Iterator[slice]]:
        """The chunks of the sequence, from its start across the border of text and image, as SageAttention wants them.

        The first has all of the text, so that no chunk takes more than the first two.

        Args:
            rows: temporary memory of one token, in hidden states of one.
        """
        batch, _, width = self._like.shape
        unit_bytes = rows * batch * width * self._like.element_size()
        return state.tokens(
            kind, *modules, total=self.total, unit_bytes=unit_bytes, smallest=max(TOKEN_MULTIPLE, self.text_length)
        )

    def new_empty(self) -> Tensor:
        """Room for one tensor (B, S, D) of the sequence."""
        batch, _, width = self._like.shape
        return self._like.new_empty(batch, self.total, width)

    def input(self, tokens: slice) -> Tensor:
        parts = [
            self.norm(stream.hidden_BLD[:, own]) * (1 + stream.scale_B1D) + stream.shift_B1D
            for stream, own, _ in self._parts(tokens)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add(self, tokens: slice, output_BnD: Tensor) -> None:
        for stream, own, part in self._parts(tokens):
            stream.hidden_BLD[:, own].add_(stream.gate_B1D * output_BnD[:, part])

    def _parts(self, tokens: slice) -> Iterator[tuple[_Stream, slice, slice]]:
        """The streams that some tokens of the sequence belong to, with their places there and among these tokens."""
        for stream in self._streams:
            start = max(tokens.start, stream.first)
            stop = min(tokens.stop, stream.first + stream.hidden_BLD.shape[1])
            if start < stop:
                own, part = (slice(start - first, stop - first) for first in (stream.first, tokens.start))
                yield stream, own, part


class _Block:
    """`CogVideoXBlock.forward`, a chunk of tokens at a time."""

    def __init__(self, block: Any, state: CallState, source: BlockInput) -> None:
        self._block, self._state, self._source = block, state, source

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        block, options = self._block, transformer_options or {}
        plain = all(is_plain(it, core.CogVideoXLayerNormZero) for it in (block.norm1, block.norm2))
        if not self._state.chunked or not plain:
            return core.CogVideoXBlock.forward(
                block, hidden_states, encoder_hidden_states, temb, image_rotary_emb, transformer_options
            )
        image, text = (self._source.owned(it, options) for it in (hidden_states, encoder_hidden_states))
        self._attention(_Sublayer(block.norm1, text, image, temb), image_rotary_emb, options)
        self._feed_forward(_Sublayer(block.norm2, text, image, temb))
        return image, text

    def _attention(
        self, sublayer: _Sublayer, rotary: tuple[Tensor, Tensor] | None, transformer_options: dict[str, Any]
    ) -> None:
        block, text_length = self._block, sublayer.text_length
        heads = (block.num_heads, block.head_dim)
        keys_BSD, values_BSD = sublayer.new_empty(), sublayer.new_empty()
        modules = (sublayer.norm, block.k, block.norm_k, block.v)
        with sublayer.tokens(self._state, "keys", *modules, rows=9) as chunks:
            for tokens in chunks:
                normed = sublayer.input(tokens)
                values_BSD[:, tokens] = block.v(normed)
                key_BnHd = block.norm_k(block.k(normed).unflatten(-1, heads))
                del normed
                keys_BSD[:, tokens] = _rotated(key_BnHd, rotary, tokens, text_length).flatten(2)
                del key_BnHd
        modules = (sublayer.norm, block.q, block.norm_q, block.attn_out)
        with sublayer.tokens(self._state, "queries", *modules, rows=9) as chunks:
            for tokens in chunks:
                query_BnHd = block.norm_q(block.q(sublayer.input(tokens)).unflatten(-1, heads))
                query = _rotated(query_BnHd, rotary, tokens, text_length).flatten(2)
                del query_BnHd
                attended = core.optimized_attention(
                    query, keys_BSD, values_BSD, heads=block.num_heads, transformer_options=transformer_options
                )
                del query
                sublayer.add(tokens, block.attn_out(attended))
                del attended

    def _feed_forward(self, sublayer: _Sublayer) -> None:
        block = self._block
        rows = 1 + 2 * block.ff_proj.out_features // block.dim
        modules = (sublayer.norm, block.ff_proj, block.ff_out)
        with sublayer.tokens(self._state, "feed_forward", *modules, rows=rows) as chunks:
            for tokens in chunks:
                inner = F.gelu(block.ff_proj(sublayer.input(tokens)), approximate="tanh")
                sublayer.add(tokens, block.ff_out(inner))
                del inner


class _LastNorm:
    """`CogVideoXAdaLayerNorm.forward`, a chunk of tokens at a time."""

    def __init__(self, layer: Any, state: CallState) -> None:
        self._layer, self._state = layer, state

    def __call__(self, x: Tensor, temb: Tensor) -> Tensor:
        layer = self._layer
        if not self._state.chunked:
            return core.CogVideoXAdaLayerNorm.forward(layer, x, temb)
        shift_B1D, scale_B1D = (it[:, None] for it in layer.linear(layer.silu(temb)).chunk(2, dim=1))
        batch, total, width = x.shape
        out = x.new_empty(x.shape)
        unit_bytes = 3 * batch * width * x.element_size()
        with self._state.tokens("head", layer.norm, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                out[:, tokens] = layer.norm(x[:, tokens]) * (1 + scale_B1D) + shift_B1D
        return out


class _PatchEmbedding:
    """`CogVideoXPatchEmbed.forward`, the patches of one time at a time.

    Core embeds all patches in fp32, joins them with the text, and adds positions for both: up to five times the hidden
    state.
    """

    def __init__(self, embedding: Any, state: CallState) -> None:
        self._embedding, self._state = embedding, state

    def __call__(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        embedding = self._embedding
        learned = embedding.use_learned_positional_embeddings
        # Positions that are not stored are computed for all patches together. No file leads core to such a model.
        if not self._state.chunked or (embedding.use_positional_embeddings and not learned):
            return core.CogVideoXPatchEmbed.forward(embedding, text_embeds, image_embeds)
        frames = embedding.patch_size_t or 1
        batch, all_frames, _, height, width = image_embeds.shape
        patches = (height // embedding.patch_size) * (width // embedding.patch_size)
        times = all_frames // frames
        text = embedding.text_proj(text_embeds.to(embedding.text_proj.weight.dtype)).to(text_embeds.dtype)
        text_length = text.shape[1]
        out = text.new_empty(batch, text_length + times * patches, embedding.dim)
        out[:, :text_length] = text
        for time in range(times):
            self._state.on_chunk()
            tokens = slice(time * patches, (time + 1) * patches)
            embedded = self._embedded(image_embeds[:, time * frames : (time + 1) * frames]).to(out.dtype)
            if learned:
                embedded = embedded + embedding.pos_embedding[:, embedding.max_text_seq_length :][:, tokens].to(out)
            out[:, text_length:][:, tokens] = embedded
            del embedded
        return out

    def _embedded(self, frames_BTChw: Tensor) -> Tensor:
        """The patches of one time, embedded in the precision in which core does it."""
        embedding = self._embedding
        frames_BTChw = frames_BTChw.to(embedding.proj.weight.dtype)
        if embedding.patch_size_t is None:
            return embedding.proj(frames_BTChw[:, 0]).flatten(2).transpose(1, 2)
        side = embedding.patch_size
        patches = frames_BTChw.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # B T C rows y columns x
        return embedding.proj(patches.permute(0, 3, 5, 2, 1, 4, 6).flatten(3).flatten(1, 2))


def _rotated(x_BnHd: Tensor, rotary_Ld: tuple[Tensor, Tensor] | None, tokens: slice, text_length: int) -> Tensor:
    """Queries or keys of some tokens of the sequence, of which those of the image are rotated by their position."""
    if rotary_Ld is None:
        return x_BnHd
    count = max(text_length - tokens.start, 0)  # of these tokens that are text
    cosine, sine = (it[tokens.start + count - text_length : tokens.stop - text_length] for it in rotary_Ld)
    image = core.apply_rotary_emb(x_BnHd[:, count:].transpose(1, 2), (cosine, sine)).transpose(1, 2)
    return image if count == 0 else torch.cat([x_BnHd[:, :count], image], dim=1)


MODEL = CogVideoX()
