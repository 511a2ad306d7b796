"""The first and last layers of MiniMax H3, which core computes in fp32.

Their projections are small, and not held: held weights are in the precision of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.ldm.minimax import model as core
from torch import Tensor

from ..calls import CallState


class FinalLayer:
    """`FinalLayer.forward`, a chunk of tokens at a time."""

    def __init__(self, layer: Any, state: CallState) -> None:
        self._layer, self._state = layer, state

    def __call__(
        self, x: Tensor, t_emb: Tensor, video_seg: tuple[int, int, int], audio_seg: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        layer = self._layer
        if not self._state.chunked:
            return core.FinalLayer.forward(layer, x, t_emb, video_seg, audio_seg)
        shift, scale = layer.adaln_proj(t_emb)
        video, audio = (
            self._projected(projection, x[start:end], shift[row], scale[row])
            for projection, (start, end, row) in ((layer.video_out, video_seg), (layer.audio_out, audio_seg))
        )
        return video, audio

    def _projected(self, projection: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        norm = self._layer.norm
        out = x.new_empty(len(x), projection.out_features, dtype=torch.float32)
        unit_bytes = x.shape[1] * (x.element_size() + 2 * out.element_size())
        with self._state.tokens("final_layer", norm, total=len(x), unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                out[tokens] = projection((norm(x[tokens]) * (1.0 + scale) + shift).to(torch.float32))
        return out


class PatchEmbedding:
    """The embedding of latents as tokens, made when the sequence is put together from it.

    Core embeds all patches in fp32, and holds the embedding beside the hidden state until the call ends.
    """

    def __init__(self, layer: Any, state: CallState) -> None:
        self._layer, self._state = layer, state
        self._stock: Callable[[Any, Tensor], Tensor] = type(layer).forward

    def __call__(self, rows_SP: Tensor) -> Any:
        wrapped = self._layer.__dict__.get("forward") is not self  # by another node, which wants a tensor
        if not self._state.chunked or wrapped:
            return self._stock(self._layer, rows_SP)
        return _LateEmbedding(self, rows_SP, self._state.dtype)

    def embedded(self, rows_SP: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens (S, D) of some patches."""
        width = self._layer.out_features
        out = rows_SP.new_empty(len(rows_SP), width, dtype=dtype)
        with self._state.tokens("embedding", total=len(out), unit_bytes=width * rows_SP.element_size()) as chunks:
            for tokens in chunks:
                out[tokens] = self._stock(self._layer, rows_SP[tokens])
        return out


@dataclass(frozen=True, slots=True)
class _LateEmbedding:
    """Stands for the embedding of patches as far as core uses it: its precision is chosen, and tokens are taken."""

    layer: PatchEmbedding
    rows_SP: Tensor
    dtype: torch.dtype

    def to(self, dtype: torch.dtype) -> _LateEmbedding:
        return replace(self, dtype=dtype)

    def __getitem__(self, tokens: slice) -> Tensor:
        return self.layer.embedded(self.rows_SP[tokens], self.dtype)
