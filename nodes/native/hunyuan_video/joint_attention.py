"""Attention of some tokens to the keys and values of all of them, of the text and of the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy.ldm.flux import layers
from comfy.ldm.flux.math import apply_rope1
from torch import Tensor, nn

from ..model import is_plain

ROWS_PER_TOKEN = 8
"""Rows of D numbers that making a token's query, or its key and value, takes at most: to rotate in fp32 takes five."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointAttention:
    """Keys and values of all tokens, and the attention of some tokens to them."""

    keys_BHLd: Tensor
    values_BHLd: Tensor
    rotations: Tensor
    """Rotary embedding of every token."""
    mask: Tensor | None

    @classmethod
    def empty(cls, like: Tensor, heads: int, total: int, rotations: Tensor, mask: Tensor | None) -> JointAttention:
        """Room for the keys and values of `total` tokens."""
        shape = (like.shape[0], heads, total, like.shape[2] // heads)
        return cls(keys_BHLd=like.new_empty(shape), values_BHLd=like.new_empty(shape), rotations=rotations, mask=mask)

    @property
    def total(self) -> int:
        return self.keys_BHLd.shape[2]

    def write(self, tokens: slice, norm: Any, made_BnD: Tensor) -> None:
        """Takes up some tokens' keys and values, as a linear layer makes them: D numbers of each."""
        key, value = self._by_head(made_BnD, 2)
        self.values_BHLd[:, :, tokens] = value
        self.keys_BHLd[:, :, tokens] = self._rotated(norm.key_norm(key).to(value), tokens)

    def query(self, norm: Any, made_BnD: Tensor) -> Tensor:
        """Some tokens' queries (B, H, n, d), from what a linear layer makes of them."""
        (query,) = self._by_head(made_BnD, 1)
        return norm.query_norm(query).to(self.values_BHLd)

    def attend(self, tokens: slice, query_BHnd: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """Some tokens' attention (B, n, D)."""
        query_BHnd = self._rotated(query_BHnd, tokens)
        mask = self.mask
        if mask is not None and mask.shape[-2] != 1:  # a row for each query
            mask = mask[..., tokens, :]
        # Core's function rotates what it gets unless it gets no rotations.
        return layers.attention(
            query_BHnd, self.keys_BHLd, self.values_BHLd, pe=None, mask=mask, transformer_options=transformer_options
        )

    def _by_head(self, made_BnD: Tensor, count: int) -> Tensor:
        """`count` tensors (B, H, n, d) that a linear layer has made together."""
        batch, tokens, _ = made_BnD.shape
        return made_BnD.view(batch, tokens, count, self.keys_BHLd.shape[1], -1).permute(2, 0, 3, 1, 4)

    def _rotated(self, tensor_BHnd: Tensor, tokens: slice) -> Tensor:
        return apply_rope1(tensor_BHnd, self.rotations[:, :, tokens])


def needs_all_tokens(transformer_options: dict[str, Any], *norms: nn.Module) -> bool:
    """Whether another node looks at the queries, keys or attention of all tokens."""
    patches = transformer_options.get("patches", {})
    replaced = not all(is_plain(norm, layers.QKNorm) for norm in norms)
    return replaced or "attn1_patch" in patches or "attn1_output_patch" in patches
