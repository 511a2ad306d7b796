"""Layers before and after a Wan transformer's blocks: patches as tokens and back, and the inputs that blocks share.

Legend: B batch, S tokens of the video, R runs of tokens that share a time step, L tokens of the context, D width of a
token, d width of a head, C channels, T/H/W latent frames, height and width, P elements of a patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...chunking.execution import Execution
from . import workspace


class OwnWeights(nn.Module):
    """A module that holds the parameters that another holds beside its submodules, so that a runner can place them."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        for name, parameter in owner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


_own_weights: WeakKeyDictionary[nn.Module, OwnWeights] = WeakKeyDictionary()


def own_weights(owner: nn.Module) -> OwnWeights:
    """Return a module's `OwnWeights`, the same object each time, so that a runner recognises it."""
    known = _own_weights.get(owner)
    held = list(owner.parameters(recurse=False))
    if known is None or any(a is not b for a, b in zip(known.parameters(), held, strict=True)):
        known = _own_weights[owner] = OwnWeights(owner)
    return known


@dataclass(frozen=True, slots=True)
class TokenRuns:
    """Runs of successive tokens that share a time step, in order. A clip with one time step is one run."""

    slices: tuple[slice, ...]

    def within(self, tokens: slice) -> Iterator[tuple[int, slice]]:
        """Yield the index of each run in a slice of the tokens, and its tokens, counted from the slice's start."""
        for index, run in enumerate(self.slices):
            start, stop = max(run.start, tokens.start), min(run.stop, tokens.stop)
            if start < stop:
                yield index, slice(start - tokens.start, stop - tokens.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary position embedding: cosines and sines (S, 1, d / 2) of the angle of each token and pair of elements."""

    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, heads_BnHd: torch.Tensor, tokens: slice) -> None:
        """Rotate the heads of some tokens, in place (Su et al., "RoFormer", 2021)."""
        cos, sin = self.cos[tokens], self.sin[tokens]
        even, odd = heads_BnHd[..., 0::2], heads_BnHd[..., 1::2]
        rotated_even = (even * cos).sub_(odd * sin)
        rotated_odd = (even * sin).add_(odd * cos)
        even.copy_(rotated_even)
        odd.copy_(rotated_odd)


@dataclass(frozen=True, slots=True, kw_only=True)
class WanBlockInputs:
    """Tensors that every block takes beside the tokens."""

    runs: TokenRuns

    steps_RBD: torch.Tensor
    """Embedded time step of each run."""

    modulation_RB6D: torch.Tensor
    """Shifts, scales and gates of each run's time step, to which each block adds its own."""

    context_BLD: torch.Tensor
    """Picture and text tokens for cross-attention."""

    rotary: Rotary


def block_inputs(
    model: Any,
    execution: Execution,
    *,
    sample_BCTHW: torch.Tensor,
    timestep: torch.Tensor,
    text_BLC: torch.Tensor,
    image_BLC: torch.Tensor | None,
) -> WanBlockInputs:
    """Compute the inputs that all blocks share from the arguments of the forward."""
    batch, _, *sizes = sample_BCTHW.shape
    patches = tuple(size // patch for size, patch in zip(sizes, model.config.patch_size, strict=True))
    runs, steps_RB = _runs(timestep, patches)
    width = model.patch_embedding.out_channels
    unit_bytes = batch * workspace.embeddings(
        width=width,
        text_tokens=text_BLC.shape[1],
        image_tokens=0 if image_BLC is None else image_BLC.shape[1],
        steps=len(runs.slices),
        itemsize=text_BLC.element_size(),
    )
    unit_bytes += workspace.angles(
        tokens=prod(patches),
        head_width=model.config.attention_head_dim,
        itemsize=model.rope.freqs_cos.element_size(),
    )
    with execution.layer("embeddings", model.condition_embedder, model.rope, total=1, unit_bytes=unit_bytes):
        rotary = _rotary(model.rope, patches)
        steps, modulation, text, image = model.condition_embedder(steps_RB.flatten(), text_BLC, image_BLC)
        return WanBlockInputs(
            runs=runs,
            steps_RBD=steps.view(len(runs.slices), batch, width),
            modulation_RB6D=modulation.view(len(runs.slices), batch, 6, width),
            context_BLD=text if image is None else torch.cat([image, text], dim=1),
            rotary=rotary,
        )


def _runs(timestep: torch.Tensor, patches: tuple[int, ...]) -> tuple[TokenRuns, torch.Tensor]:
    """Return the runs and their time steps (R, B), for one time step a branch (B) or one a token (B, S)."""
    frames, *plane = patches
    tokens_of_frame = plane[0] * plane[1]
    total = frames * tokens_of_frame
    if timestep.ndim == 1:
        return TokenRuns((slice(0, total),)), timestep[None]
    if timestep.is_meta:  # has no values; assume those of TI2V, where the first frame is given and has step 0
        starts = [0, tokens_of_frame][:frames]
    else:
        changes = (timestep[:, 1:] != timestep[:, :-1]).any(dim=0)
        starts = [0, *(int(before) + 1 for before in changes.nonzero())]
    ends = [*starts[1:], total]
    return TokenRuns(tuple(map(slice, starts, ends))), timestep[:, starts].T


def _rotary(rope: Any, patches: tuple[int, ...]) -> Rotary:
    """Return the embedding of a `WanRotaryPosEmbed`, which holds each number for both elements of a pair."""
    widths: list[int] = [rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2]
    ends = list(accumulate(widths))

    def table(angles: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for axis, (count, end) in enumerate(zip(patches, ends, strict=True)):
            axis_angles = angles[:count, end - widths[axis] : end]
            shape = [1, 1, 1, widths[axis]]
            shape[axis] = count
            parts.append(axis_angles.reshape(shape).expand(*patches, -1))
        return torch.cat(parts, dim=-1).view(-1, 1, sum(widths))

    return Rotary(cos=table(rope.freqs_cos[:, 0::2]), sin=table(rope.freqs_sin[:, 1::2]))


def embed_patches(model: Any, execution: Execution, sample_BCTHW: torch.Tensor) -> torch.Tensor:
    """Return the first hidden state (B, S, D), from patches that are embedded a few latent frames at a time."""
    batch, _, frames, height, width = sample_BCTHW.shape
    embed = model.patch_embedding
    deep, high, wide = model.config.patch_size
    frame_tokens = (height // high) * (width // wide)
    total = frames // deep
    tokens_BSD = sample_BCTHW.new_empty(batch, total * frame_tokens, embed.out_channels)
    unit_bytes = batch * frame_tokens * embed.out_channels * sample_BCTHW.element_size()
    with execution.layer("patches", embed, total=total, unit_bytes=unit_bytes, result_excluded=True) as call:
        for piece in () if execution.runner.shape_only else execution.chunks(call):
            patches = embed(sample_BCTHW[:, :, piece.start * deep : piece.stop * deep])
            tokens_BSD[:, piece.start * frame_tokens : piece.stop * frame_tokens] = patches.flatten(2).transpose(1, 2)
            del patches
    return tokens_BSD


def unpatch(patches_BSP: torch.Tensor, shape: tuple[int, ...], patch: tuple[int, int, int]) -> torch.Tensor:
    """Return the prediction (B, C, T, H, W), rearranged from patches (B, S, P)."""
    batch, _, *sizes = shape
    counts = [size // side for size, side in zip(sizes, patch, strict=True)]
    parts = patches_BSP.view(batch, *counts, *patch, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    return parts.flatten(6, 7).flatten(4, 5).flatten(2, 3)
