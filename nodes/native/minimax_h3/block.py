"""A block of MiniMax H3: attention for some heads at a time, the rest for some tokens at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management as management
import comfy.quant_ops
from comfy.ldm.minimax import model as core
from torch import Tensor, nn

from ..calls import CallState
from ..fused_linear import has_sliceable_format, linear_rows
from ..model import is_plain

Segments = Sequence[tuple[int, int, int]]
"""First token, end, and row of the modulation, for each stretch of the sequence."""


@dataclass(frozen=True, slots=True)
class _Modulation:
    """Norm, shift, scale and gate of one half of a block."""

    norm: nn.Module
    shift: Tensor
    scale: Tensor
    gate: Tensor
    segments: Segments

    def normed(self, x_SD: Tensor, tokens: slice) -> Tensor:
        """Some tokens, normalised, scaled and shifted."""
        return core._mod_scale_shift(self.norm(x_SD[tokens]), self.shift, self.scale, self._within(tokens))

    def add(self, x_SD: Tensor, made: Tensor, tokens: slice) -> None:
        """Adds what a layer has made of some tokens to them, times the gate."""
        core._mod_gate(x_SD[tokens], self.gate, made, self._within(tokens))

    def _within(self, tokens: slice) -> Segments:
        """The segments of some tokens, counted from the first of them."""
        first, end = tokens.start, tokens.stop
        return [
            (max(a, first) - first, min(b, end) - first, row) for a, b, row in self.segments if a < end and b > first
        ]


class Block:
    """`DiTBlock.forward`: attention for some heads at a time, the rest for some tokens at a time."""

    def __init__(self, block: Any, state: CallState) -> None:
        self._block, self._state = block, state

    def __call__(
        self,
        x: Tensor,
        t_emb: Tensor,
        mod_segments: Segments,
        rope_freqs: Tensor | None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
    ) -> Tensor:
        block = self._block
        if not self._state.chunked:
            return core.DiTBlock.forward(
                block, x, t_emb, mod_segments, rope_freqs, transformer_options=transformer_options
            )
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block.adaln_proj(t_emb)
        modulation = _Modulation(block.norm1, shift, scale, gate, mod_segments)
        everything = slice(0, len(x))
        if is_plain(block.attn, core.Attention) and rope_freqs is not None:
            attended = self._attended(x, modulation, rope_freqs, transformer_options)
            self._project_out(x, modulation, attended)
            del attended
        else:  # replaced by another node
            normed = modulation.normed(x, everything)
            made = block.attn(normed, rope_freqs=rope_freqs, transformer_options=transformer_options)
            modulation.add(x, made, everything)
            del normed, made
        modulation = _Modulation(block.norm2, shift_mlp, scale_mlp, gate_mlp, mod_segments)
        if is_plain(block.mlp, core.MLP):
            self._feed_forward(x, modulation)
        else:
            modulation.add(x, block.mlp(modulation.normed(x, everything)), everything)
        return x

    def _attended(
        self, x: Tensor, modulation: _Modulation, rope_freqs: Tensor, transformer_options: dict[str, Any]
    ) -> Tensor:
        """Attention's result (S, H, d), before the projection that mixes the heads."""
        attention = self._block.attn
        total, count, width = len(x), attention.heads, attention.head_dim
        attended = x.new_empty(total, count, width)
        # Half of the workspace is for a group's keys, values and result; the other half for the chunks that make them.
        unit_bytes = 2 * 3 * total * width * x.element_size()
        modules = (modulation.norm, attention.qkv_proj)
        together = not has_sliceable_format(attention.qkv_proj)
        with self._state.heads("attention", *modules, total=count, unit_bytes=unit_bytes, together=together) as groups:
            for heads in groups:
                query = attended[:, heads]  # a group's queries lie where its result will
                key, value = self._project_in(x, modulation, rope_freqs, heads, query)
                result = core.optimized_attention(
                    *(it.transpose(0, 1).unsqueeze(0) for it in (query, key, value)),
                    heads.stop - heads.start,
                    mask=None,
                    skip_reshape=True,
                    transformer_options=transformer_options,
                )
                del key, value
                query.copy_(result.view(query.shape))
                del result
        return attended

    def _project_in(
        self, x: Tensor, modulation: _Modulation, rope_freqs: Tensor, heads: slice, query: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values (S, h, d) of some heads, for all tokens; their queries are written to `query`."""
        attention = self._block.attn
        total, count, width = query.shape
        key, value = (x.new_empty(total, count, width) for _ in range(2))
        inner = attention.heads * width
        rows = [slice(start + heads.start * width, start + heads.stop * width) for start in (0, inner, 2 * inner)]
        row = count * width
        # The input has gone before the rotation, which takes seven rows where core has no kernel for it.
        unit_bytes = 2 * (max(x.shape[1], 7 * row) + 3 * row) * x.element_size()
        with self._state.tokens("qkv", total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                made = _outputs(attention.qkv_proj, modulation.normed(x, tokens), rows)
                made = [it.view(1, -1, count, width) for it in made]
                _rotate(attention, made[0], made[1], rope_freqs[:, tokens])
                query[tokens], key[tokens], value[tokens] = made[0][0], made[1][0], made[2][0]
                del made
        return key, value

    def _project_out(self, x: Tensor, modulation: _Modulation, attended: Tensor) -> None:
        projection = self._block.attn.out_proj
        unit_bytes = x.shape[1] * x.element_size()
        with self._state.tokens("attention_out", projection, total=len(x), unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                modulation.add(x, projection(attended[tokens].flatten(1)), tokens)

    def _feed_forward(self, x: Tensor, modulation: _Modulation) -> None:
        mlp = self._block.mlp
        unit_bytes = (2 * x.shape[1] + 3 * mlp.fc2.in_features) * x.element_size()
        modules = (modulation.norm, mlp.fc1, mlp.fc2)
        with self._state.tokens("feed_forward", *modules, total=len(x), unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                modulation.add(x, mlp(modulation.normed(x, tokens)), tokens)


def _outputs(layer: Any, inputs: Tensor, rows: Sequence[slice]) -> list[Tensor]:
    """Some outputs of a layer, by their rows of its weight."""
    return [linear_rows(layer, inputs, it) for it in rows]


def _rotate(attention: Any, query_1nhd: Tensor, key_1nhd: Tensor, rope_freqs: Tensor) -> None:
    """Normalises and rotates some tokens' queries and keys in place, as core does for all.

    Core's kernel takes both together: for one alone it has no rotation of a part of the head.
    """
    weights = (management.cast_to(it.weight, device=query_1nhd.device) for it in (attention.q_norm, attention.k_norm))
    comfy.quant_ops.ck.rms_rope_split_half_(
        query_1nhd,
        key_1nhd,
        rope_freqs,
        *weights,
        epsilon=attention.q_norm.eps,
        rot_dim=rope_freqs.shape[-3] * 2,
    )
