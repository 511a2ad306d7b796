"""A double block, whose streams of text and image attend to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.flux import layers
from torch import Tensor, nn

from ..calls import CallState
from ..fused_linear import linear_rows
from .hidden_state import Segments, add_gated, modulated, row_bytes, within_fp16
from .joint_attention import ROWS_PER_TOKEN, JointAttention, needs_all_tokens


class DoubleBlock:
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
        if not self._state.chunked or needs_all_tokens(transformer_options, *norms):
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
            joint = JointAttention.empty(img, block.num_heads, txt.shape[1] + img.shape[1], pe, attn_mask)
            for stream in (text, image):
                self._write_keys(stream, joint)
            self._attend((text, image), joint, transformer_options)
            del joint
        for stream in (text, image):
            self._feed_forward(stream)
        return img, within_fp16(txt)

    def _write_keys(self, stream: _Stream, joint: JointAttention) -> None:
        attention = stream.attention
        with self._state.tokens("keys", total=stream.total, unit_bytes=ROWS_PER_TOKEN * stream.row_bytes) as chunks:
            for tokens in chunks:
                normed = modulated(stream.hidden, stream.norm1, stream.modulation1, stream.segments, tokens)
                made = linear_rows(attention.qkv, normed, slice(self._block.hidden_size, None))
                del normed
                joint.write(stream.in_joint(tokens), attention.norm, made)
                del made

    def _attend(self, streams: tuple[_Stream, ...], joint: JointAttention, transformer_options: dict[str, Any]) -> None:
        """Attention in chunks of the joint sequence, one of which has tokens of both streams.

        Kernels that quantise queries by blocks, such as SageAttention's, then meet the blocks that they meet in core.
        """
        unit_bytes = ROWS_PER_TOKEN * streams[0].row_bytes
        with self._state.tokens("queries", total=joint.total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                parts = [(stream, own) for stream in streams if (own := stream.of_joint(tokens)) is not None]
                queries = [self._query(stream, own, joint) for stream, own in parts]
                query = queries[0] if len(parts) == 1 else torch.cat(queries, 2)
                del queries
                attended = joint.attend(tokens, query, transformer_options)
                del query
                _add_attended(attended, parts)
                del attended

    def _query(self, stream: _Stream, tokens: slice, joint: JointAttention) -> Tensor:
        normed = modulated(stream.hidden, stream.norm1, stream.modulation1, stream.segments, tokens)
        made = linear_rows(stream.attention.qkv, normed, slice(self._block.hidden_size))
        return joint.query(stream.attention.norm, made)

    def _feed_forward(self, stream: _Stream) -> None:
        inner_bytes = stream.row_bytes * stream.mlp[0].out_features // self._block.hidden_size
        unit_bytes = stream.row_bytes + 2 * inner_bytes
        with self._state.tokens("feed_forward", stream.mlp, total=stream.total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                made = stream.mlp(modulated(stream.hidden, stream.norm2, stream.modulation2, stream.segments, tokens))
                add_gated(stream.hidden, made, stream.modulation2, stream.segments, tokens)
                del made


def _add_attended(attended: Tensor, parts: Sequence[tuple[_Stream, slice]]) -> None:
    """Adds the attention (B, n, D) of some tokens to the streams that they belong to."""
    pieces = attended.split([tokens.stop - tokens.start for _, tokens in parts], 1)
    for (stream, tokens), piece in zip(parts, pieces, strict=True):
        made = stream.attention.proj(piece)
        add_gated(stream.hidden, made, stream.modulation1, stream.segments, tokens)


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
    """Place of the first token in the joint sequence."""

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
        return row_bytes(self.hidden)

    def in_joint(self, tokens: slice) -> slice:
        """Places of some tokens in the joint sequence."""
        return slice(self.first + tokens.start, self.first + tokens.stop)

    def of_joint(self, tokens: slice) -> slice | None:
        """Tokens of this stream among some of the joint sequence; None if there are none."""
        start, stop = max(tokens.start - self.first, 0), min(tokens.stop - self.first, self.total)
        return slice(start, stop) if start < stop else None
