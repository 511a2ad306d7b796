"""Core's HunyuanVideo 1.0 and 1.5 in chunks of tokens, equal to core's own forward.

A double block has a stream of text and one of the image, which attend to each other; a single block has both in one.
Keys and values are made for all tokens, and everything else runs on some tokens at a time. Hidden states are updated
in place, as core's own blocks do it.

Shape legend: B batch, H heads, L tokens (text first), n tokens of a chunk, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux import layers
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.hunyuan_video import model as core
from comfy.ldm.modules.diffusionmodules.mmdit import PatchEmbed
from torch import Tensor, nn

from .calls import CallState
from .fused_linear import linear_parts
from .model import Patch, is_plain
from .patch_embedding import embedded_by_frame

Segments: TypeAlias = Sequence[tuple[int, int | None, int]] | None
"""Runs of tokens (from, to, row of the modulation); None: all tokens have the one row that there is."""
_ROWS = 8
"""Rows of D numbers that a token's query, or its key and value, take at most: rotating one in fp32 takes five."""


class HunyuanVideo:
    """`model.NativeModel` for every core model that is built as HunyuanVideo."""

    name = "HunyuanVideo"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.HunyuanVideo)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        return ("double_blocks", "single_blocks")

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        """Replacement forwards by their path below the model; parts that are not core's own are left out."""
        for index, block in enumerate(model.double_blocks):
            if type(block) is layers.DoubleStreamBlock:
                yield Patch(f"double_blocks.{index}", block, _DoubleBlock(block, state))
        for index, block in enumerate(model.single_blocks):
            if type(block) is layers.SingleStreamBlock:
                yield Patch(f"single_blocks.{index}", block, _SingleBlock(block, state))
        if type(model.final_layer) is layers.LastLayer:
            yield Patch("final_layer", model.final_layer, _LastLayer(model.final_layer, state))
        if type(model.img_in) is PatchEmbed and len(model.patch_size) == 3:
            yield Patch("img_in", model.img_in, _PatchEmbedding(model.img_in, state))


class _DoubleBlock:
    """`DoubleStreamBlock.forward`, a chunk of tokens at a time."""

    def __init__(self, block: Any, state: CallState) -> None:
        self._block, self._state = block, state

    def __call__(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor,
        pe: Tensor,
        attn_mask: Tensor | None = None,
        modulation_dims_img: Segments = None,
        modulation_dims_txt: Segments = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
    ) -> tuple[Tensor, Tensor]:
        block = self._block
        norms = (block.txt_attn.norm, block.img_attn.norm)
        if not self._state.chunked or _needs_all_tokens(transformer_options, *norms):
            return layers.DoubleStreamBlock.forward(
                block,
                img,
                txt,
                vec,
                pe,
                attn_mask,
                modulation_dims_img,
                modulation_dims_txt,
                transformer_options=transformer_options,
            )
        text = _Stream.of(block, "txt", txt, vec, modulation_dims_txt, first=0)
        image = _Stream.of(block, "img", img, vec, modulation_dims_img, first=txt.shape[1])
        with self._state.weights("attention", block.txt_attn, block.img_attn):
            joint = _JointAttention.empty(img, block.num_heads, txt.shape[1] + img.shape[1], pe, attn_mask)
            for stream in (text, image):
                self._write_keys(stream, joint)
            for stream in (text, image):
                self._attend(stream, joint, transformer_options)
            del joint
        for stream in (text, image):
            self._feed_forward(stream)
        return img, _within_fp16(txt)

    def _write_keys(self, stream: _Stream, joint: _JointAttention) -> None:
        attention = stream.attention
        with self._state.tokens("keys", total=stream.total, unit_bytes=_ROWS * stream.row_bytes) as chunks:
            for tokens in chunks:
                normed = _modulated(stream.hidden, stream.norm1, stream.modulation1, stream.segments, tokens)
                (made,) = linear_parts(attention.qkv, normed, slice(self._block.hidden_size, None))
                del normed
                joint.write(stream.in_sequence(tokens), attention.norm, made)
                del made

    def _attend(self, stream: _Stream, joint: _JointAttention, transformer_options: dict[str, Any]) -> None:
        attention = stream.attention
        with self._state.tokens("queries", total=stream.total, unit_bytes=_ROWS * stream.row_bytes) as chunks:
            for tokens in chunks:
                normed = _modulated(stream.hidden, stream.norm1, stream.modulation1, stream.segments, tokens)
                (query,) = linear_parts(attention.qkv, normed, slice(self._block.hidden_size))
                del normed
                attended = joint.attend(stream.in_sequence(tokens), attention.norm, query, transformer_options)
                del query
                made = attention.proj(attended)
                del attended
                _add_gated(stream.hidden, made, stream.modulation1, stream.segments, tokens)
                del made

    def _feed_forward(self, stream: _Stream) -> None:
        inner_bytes = stream.row_bytes * stream.mlp[0].out_features // self._block.hidden_size
        unit_bytes = stream.row_bytes + 2 * inner_bytes
        with self._state.tokens("feed_forward", stream.mlp, total=stream.total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                made = stream.mlp(
                    _modulated(stream.hidden, stream.norm2, stream.modulation2, stream.segments, tokens)
                )
                _add_gated(stream.hidden, made, stream.modulation2, stream.segments, tokens)
                del made


class _SingleBlock:
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
        if not self._state.chunked or _needs_all_tokens(transformer_options, block.norm):
            return layers.SingleStreamBlock.forward(
                block, x, vec, pe, attn_mask, modulation_dims, transformer_options=transformer_options
            )
        modulation, _ = block.modulation(vec)
        with self._state.weights("single_block", block.linear1, block.norm, block.linear2):
            joint = _JointAttention.empty(x, block.num_heads, x.shape[1], pe, attn_mask)
            self._write_keys(x, modulation, modulation_dims, joint)
            self._update(x, modulation, modulation_dims, joint, transformer_options)
            del joint
        return _within_fp16(x)

    def _write_keys(self, hidden: Tensor, modulation: Any, segments: Segments, joint: _JointAttention) -> None:
        block, width = self._block, self._block.hidden_size
        unit_bytes = _ROWS * _row_bytes(hidden)
        with self._state.tokens("keys", total=hidden.shape[1], unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                normed = _modulated(hidden, block.pre_norm, modulation, segments, tokens)
                (made,) = linear_parts(block.linear1, normed, slice(width, 3 * width))
                del normed
                joint.write(tokens, block.norm, made)
                del made

    def _update(
        self,
        hidden: Tensor,
        modulation: Any,
        segments: Segments,
        joint: _JointAttention,
        transformer_options: dict[str, Any],
    ) -> None:
        """Attention and feed-forward, side by side, which the second linear layer takes together."""
        block, width = self._block, self._block.hidden_size
        parts = (slice(width), slice(3 * width, None))
        unit_bytes = _row_bytes(hidden) * (_ROWS * width + block.mlp_hidden_dim) // width
        with self._state.tokens("queries", total=hidden.shape[1], unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                normed = _modulated(hidden, block.pre_norm, modulation, segments, tokens)
                query, inner = linear_parts(block.linear1, normed, *parts)
                del normed
                inner = block.mlp_act(inner)
                attended = joint.attend(tokens, block.norm, query, transformer_options)
                del query
                both = torch.cat((attended, inner), 2)
                del attended, inner
                made = block.linear2(both)
                del both
                _add_gated(hidden, made, modulation, segments, tokens)
                del made


class _LastLayer:
    """`LastLayer.forward`, a chunk of tokens at a time."""

    def __init__(self, layer: Any, state: CallState) -> None:
        self._layer, self._state = layer, state

    def __call__(self, x: Tensor, vec: Tensor, modulation_dims: Segments = None) -> Tensor:
        layer = self._layer
        if not self._state.chunked:
            return layers.LastLayer.forward(layer, x, vec, modulation_dims)
        shift, scale = layer.adaLN_modulation(vec[:, None, :] if vec.ndim == 2 else vec).chunk(2, dim=-1)
        modulation = layers.ModulationOut(shift=shift, scale=scale, gate=scale)
        batch, total, _ = x.shape
        out = x.new_empty(batch, total, layer.linear.out_features)
        with self._state.tokens("head", layer.linear, total=total, unit_bytes=3 * _row_bytes(x)) as chunks:
            for tokens in chunks:
                out[:, tokens] = layer.linear(_modulated(x, layer.norm_final, modulation, modulation_dims, tokens))
        return out


class _PatchEmbedding:
    """`PatchEmbed.forward` for videos, a latent frame at a time.

    Core returns a transposed view of the convolution's result; this writes the tokens as the blocks read them.
    """

    def __init__(self, embedding: Any, state: CallState) -> None:
        self._embedding, self._state = embedding, state

    def __call__(self, x: Tensor) -> Tensor:
        embedding = self._embedding
        if not self._state.chunked:
            return PatchEmbed.forward(embedding, x)
        if embedding.dynamic_img_pad:
            x = pad_to_patch_size(x, embedding.patch_size, padding_mode=embedding.padding_mode)
        tokens_BThwD = embedded_by_frame(embedding.proj, x, embedding.patch_size[0], self._state)
        return embedding.norm(tokens_BThwD.flatten(1, 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """The text, or the image, in a call of a double block."""

    hidden: Tensor
    attention: Any
    mlp: Any
    norm1: nn.Module
    norm2: nn.Module
    modulation1: Any
    modulation2: Any
    segments: Segments
    first: int
    """Place of the first token in the sequence of both streams."""

    @classmethod
    def of(cls, block: Any, name: str, hidden: Tensor, vec: Tensor, segments: Segments, *, first: int) -> _Stream:
        """The stream of a name ("txt", "img") with the block's layers for it."""
        modulation1, modulation2 = getattr(block, f"{name}_mod")(vec)
        return cls(
            hidden=hidden,
            attention=getattr(block, f"{name}_attn"),
            mlp=getattr(block, f"{name}_mlp"),
            norm1=getattr(block, f"{name}_norm1"),
            norm2=getattr(block, f"{name}_norm2"),
            modulation1=modulation1,
            modulation2=modulation2,
            segments=segments,
            first=first,
        )

    @property
    def total(self) -> int:
        return self.hidden.shape[1]

    @property
    def row_bytes(self) -> int:
        return _row_bytes(self.hidden)

    def in_sequence(self, tokens: slice) -> slice:
        return slice(self.first + tokens.start, self.first + tokens.stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class _JointAttention:
    """Keys and values of all tokens, and the attention of some tokens to them."""

    keys_BHLd: Tensor
    values_BHLd: Tensor
    rotations: Tensor
    """Rotary embedding of every token."""
    mask: Tensor | None

    @classmethod
    def empty(cls, like: Tensor, heads: int, total: int, rotations: Tensor, mask: Tensor | None) -> _JointAttention:
        """Room for the keys and values of `total` tokens."""
        shape = (like.shape[0], heads, total, like.shape[2] // heads)
        return cls(
            keys_BHLd=like.new_empty(shape), values_BHLd=like.new_empty(shape), rotations=rotations, mask=mask
        )

    def write(self, tokens: slice, norm: Any, made_BnD: Tensor) -> None:
        """Takes up some tokens' keys and values, as a linear layer makes them: D numbers of each."""
        key, value = self._by_head(made_BnD, 2)
        self.values_BHLd[:, :, tokens] = value
        self.keys_BHLd[:, :, tokens] = self._rotated(norm.key_norm(key).to(value), tokens)

    def attend(self, tokens: slice, norm: Any, made_BnD: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """Some tokens' attention (B, n, D), from their queries as a linear layer makes them."""
        (query,) = self._by_head(made_BnD, 1)
        query = self._rotated(norm.query_norm(query).to(self.values_BHLd), tokens)
        mask = self.mask
        if mask is not None and mask.shape[-2] != 1:  # a row for each query
            mask = mask[..., tokens, :]
        # Core's function rotates what it gets unless it gets no rotations.
        return layers.attention(
            query, self.keys_BHLd, self.values_BHLd, pe=None, mask=mask, transformer_options=transformer_options
        )

    def _by_head(self, made_BnD: Tensor, count: int) -> Tensor:
        """`count` tensors (B, H, n, d) that a linear layer has made together."""
        batch, tokens, _ = made_BnD.shape
        return made_BnD.view(batch, tokens, count, self.keys_BHLd.shape[1], -1).permute(2, 0, 3, 1, 4)

    def _rotated(self, tensor_BHnd: Tensor, tokens: slice) -> Tensor:
        return apply_rope1(tensor_BHnd, self.rotations[:, :, tokens])


def _needs_all_tokens(transformer_options: dict[str, Any], *norms: nn.Module) -> bool:
    """Whether another node looks at the queries, keys or attention of all tokens."""
    patches = transformer_options.get("patches", {})
    replaced = not all(is_plain(norm, layers.QKNorm) for norm in norms)
    return replaced or "attn1_patch" in patches or "attn1_output_patch" in patches


def _row_bytes(hidden: Tensor) -> int:
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


def _modulated(hidden: Tensor, norm: nn.Module, modulation: Any, segments: Segments, tokens: slice) -> Tensor:
    """Some tokens (B, n, D), normalised, scaled and shifted."""
    normed = norm(hidden[:, tokens])
    return layers.apply_mod(normed, 1 + modulation.scale, modulation.shift, _within(segments, tokens))


def _add_gated(hidden: Tensor, made: Tensor, modulation: Any, segments: Segments, tokens: slice) -> None:
    """Adds a layer's result to some tokens, in place."""
    hidden[:, tokens].add_(layers.apply_mod(made, modulation.gate, None, _within(segments, tokens)))


def _within_fp16(hidden: Tensor) -> Tensor:
    """The hidden state with overflows replaced, as core's blocks do in fp16."""
    if hidden.dtype != torch.float16:
        return hidden
    return torch.nan_to_num(hidden, nan=0.0, posinf=65504, neginf=-65504)


MODEL = HunyuanVideo()
