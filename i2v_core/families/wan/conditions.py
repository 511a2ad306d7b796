"""What the blocks of a Wan transformer look at beside the tokens: time step, context, and where a token is.

Legend: B batch, S tokens of the video, R runs of tokens that share a time step, L tokens of the context, D width of a
token, d width of a head, T/h/w patches along time, height and width.
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
    """The parameters that a module holds beside its submodules, as a module that a runner can place."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        for name, parameter in owner.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


_own_weights: WeakKeyDictionary[nn.Module, OwnWeights] = WeakKeyDictionary()


def own_weights(owner: nn.Module) -> OwnWeights:
    """Always the same for a module that holds the same parameters, so that a runner knows it again."""
    known = _own_weights.get(owner)
    held = list(owner.parameters(recurse=False))
    if known is None or any(a is not b for a, b in zip(known.parameters(), held, strict=True)):
        known = _own_weights[owner] = OwnWeights(owner)
    return known


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of neighbouring tokens that share a time step, in order. A clip with one time step is one run."""

    slices: tuple[slice, ...]

    def within(self, tokens: slice) -> Iterator[tuple[int, slice]]:
        """The runs that some of the tokens are of: the run's index, and its tokens counted from the first of these."""
        for index, run in enumerate(self.slices):
            start, stop = max(run.start, tokens.start), min(run.stop, tokens.stop)
            if start < stop:
                yield index, slice(start - tokens.start, stop - tokens.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """The angles that queries and keys are turned by: cosines and sines (S, 1, d / 2) of token and pair."""

    cos: torch.Tensor
    sin: torch.Tensor

    def rotate(self, heads_BnHd: torch.Tensor, tokens: slice) -> None:
        """Turns the heads of some tokens, in place (Su et al., "RoFormer", 2021)."""
        cos, sin = self.cos[tokens], self.sin[tokens]
        even, odd = heads_BnHd[..., 0::2], heads_BnHd[..., 1::2]
        turned_even = (even * cos).sub_(odd * sin)
        turned_odd = (even * sin).add_(odd * cos)
        even.copy_(turned_even)
        odd.copy_(turned_odd)


@dataclass(frozen=True, slots=True, kw_only=True)
class WanConditions:
    """`steps_RBD` and `modulation_RB6D` are the embedded time step of each run, `context_BLD` is picture and text."""

    runs: Runs
    steps_RBD: torch.Tensor
    modulation_RB6D: torch.Tensor
    context_BLD: torch.Tensor
    rotary: Rotary


def conditions(
    model: Any,
    execution: Execution,
    *,
    sample_BCTHW: torch.Tensor,
    timestep: torch.Tensor,
    text_BLC: torch.Tensor,
    image_BLC: torch.Tensor | None,
) -> WanConditions:
    """All that the blocks look at, from what the caller gave."""
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
        return WanConditions(
            runs=runs,
            steps_RBD=steps.view(len(runs.slices), batch, width),
            modulation_RB6D=modulation.view(len(runs.slices), batch, 6, width),
            context_BLD=text if image is None else torch.cat([image, text], dim=1),
            rotary=rotary,
        )


def _runs(timestep: torch.Tensor, patches: tuple[int, ...]) -> tuple[Runs, torch.Tensor]:
    """Runs of the tokens, and the time step of each (R, B), from one a branch (B) or one a token (B, S)."""
    frames, *plane = patches
    tokens_of_frame = plane[0] * plane[1]
    total = frames * tokens_of_frame
    if timestep.ndim == 1:
        return Runs((slice(0, total),)), timestep[None]
    if timestep.is_meta:  # without values: as where the first frame is given, and the others are denoised
        starts = [0, tokens_of_frame][:frames]
    else:
        changes = (timestep[:, 1:] != timestep[:, :-1]).any(dim=0)
        starts = [0, *(int(before) + 1 for before in changes.nonzero())]
    ends = [*starts[1:], total]
    return Runs(tuple(map(slice, starts, ends))), timestep[:, starts].T


def _rotary(rope: Any, patches: tuple[int, ...]) -> Rotary:
    """The numbers of a `WanRotaryPosEmbed`, each once where that has it for both of a pair."""
    widths: list[int] = [rope.t_dim // 2, rope.h_dim // 2, rope.w_dim // 2]
    ends = list(accumulate(widths))

    def table(angles: torch.Tensor) -> torch.Tensor:
        parts: list[torch.Tensor] = []
        for axis, (count, end) in enumerate(zip(patches, ends, strict=True)):
            of_axis = angles[:count, end - widths[axis] : end]
            shape = [1, 1, 1, widths[axis]]
            shape[axis] = count
            parts.append(of_axis.reshape(shape).expand(*patches, -1))
        return torch.cat(parts, dim=-1).view(-1, 1, sum(widths))

    return Rotary(cos=table(rope.freqs_cos[:, 0::2]), sin=table(rope.freqs_sin[:, 1::2]))
