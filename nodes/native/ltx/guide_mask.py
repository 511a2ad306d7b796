"""Masks that weaken attention between the clip and its guides, made for some queries at a time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from comfy.ldm.lightricks import model as core
from torch import Tensor

_CORE_MASK = getattr(core, "GuideAttentionMask", None)
"""Core's mask in two parts; older versions of core make one for all queries and keys."""


@dataclass(frozen=True, slots=True)
class GuideMask:
    """Weights of the guides' tokens, which follow those of the clip."""

    total: int
    """Tokens, of the clip and of all guides."""
    start: int
    """First of the guides' tokens."""
    bias: Tensor
    """(1, k): logarithms of the weights of the first k guide tokens."""

    def clip_row(self) -> Tensor:
        """The mask (1, 1, 1, L) of every query of the clip."""
        row = self.bias.new_zeros(1, 1, 1, self.total)
        row[..., self.start : self.start + self.bias.shape[1]] = self.bias
        return row

    def guide_rows(self, rows: slice) -> Tensor:
        """The mask (1, 1, n, L) of some guide tokens as queries, counted from the first."""
        bias = self.bias[:, rows]
        mask = bias.new_zeros(1, 1, bias.shape[1], self.total)
        mask[..., : self.start] = bias.view(1, 1, -1, 1)
        return mask


def runs_of(mask: Any, total: int) -> list[slice]:
    """Runs of queries that one kind of mask is for: those of the clip, of the guides, and the rest."""
    if mask is None or isinstance(mask, Tensor):
        return [slice(0, total)]
    start, count = _guides_of(mask)
    bounds = pairwise((0, start, start + count, total))
    return [slice(first, stop) for first, stop in bounds if first < stop]


def rows_of_mask(mask: Any, queries: slice, total: int) -> Tensor | None:
    """The mask of some queries, which lie in one run."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        has_rows = mask.ndim > 1 and mask.shape[-2] == total > 1
        return mask[..., queries, :] if has_rows else mask
    start, count = _guides_of(mask)
    if queries.start >= start + count:
        return None
    ours = isinstance(mask, GuideMask)
    if queries.start < start:
        return mask.clip_row() if ours else mask.noisy_mask
    rows = slice(queries.start - start, queries.stop - start)
    return mask.guide_rows(rows) if ours else mask.tracked_mask[..., rows, :]


def _guides_of(mask: Any) -> tuple[int, int]:
    """First token of the guides that have weights, and how many there are."""
    if isinstance(mask, GuideMask):
        return mask.start, mask.bias.shape[1]
    return mask.guide_start, mask.tracked_count


def is_guide_mask(mask: Any) -> bool:
    """Whether core wants attention in full precision with this mask."""
    return _CORE_MASK is not None and isinstance(mask, (GuideMask, _CORE_MASK))


def guide_mask(model: Any, hidden: Tensor, arguments: dict[str, Any]) -> GuideMask | None:
    """The mask that core makes in `_build_guide_self_attention_mask`; None where it makes none.

    Args:
        model: core's model.
        hidden: (B, L, D), the video's.
        arguments: of the call, as core merges them.
    """
    guides: int = arguments.get("num_guide_tokens", 0)
    entries: list[dict[str, Any]] = arguments.get("resolved_guide_entries") or []
    weights = [_weights(model, it, hidden) for it in entries if it["surviving_count"]]
    if not guides or not any(it.get("pixel_mask") is not None or _acts(it["strength"]) for it in entries):
        return None
    if not weights:
        return None
    joined = torch.cat(weights, dim=1)
    # In a trace weights have no values: a mask is assumed.
    if not joined.is_meta and not bool(_acts(joined).any()):
        return None
    limits = torch.finfo(joined.dtype)
    bias = torch.where(joined > 0, joined.clamp(min=limits.tiny).log(), limits.min)
    return GuideMask(hidden.shape[1], hidden.shape[1] - guides, bias)


def as_core_makes_it(mask: GuideMask) -> Any:
    """A mask of core's own form and size, for tracing core's own call; its values are undefined."""
    if _CORE_MASK is None:
        return mask.bias.new_empty(1, 1, mask.total, mask.total)
    made = object.__new__(_CORE_MASK)
    made.guide_start, made.tracked_count = mask.start, mask.bias.shape[1]
    made.noisy_mask, made.tracked_mask = mask.clip_row(), mask.guide_rows(slice(None))
    return made


def _acts(weight: Any) -> Any:
    """Whether a weight changes attention: those above 1 do not in older versions of core."""
    return weight != 1.0 if _CORE_MASK is not None else weight < 1.0


def _weights(model: Any, entry: dict[str, Any], hidden: Tensor) -> Tensor:
    """Weights (1, k) of one guide's tokens."""
    pixels, latent_shape, count = entry.get("pixel_mask"), entry.get("latent_shape"), entry["surviving_count"]
    if pixels is None or latent_shape is None:
        return hidden.new_full((1, count), entry["strength"])
    pixels = pixels.to(device=hidden.device, dtype=hidden.dtype)
    return model._downsample_mask_to_latent(pixels, *latent_shape)[:1, :count] * entry["strength"]
