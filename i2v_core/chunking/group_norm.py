"""Group normalisation whose statistics span more than a chunk: two passes, as exact as one.

Legend: B batch, F frames, C channels, P pixels (height × width, or a strip of them), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import workspace
from .execution import Execution


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAffine:
    """A group normalisation whose statistics are known: `values × scale + shift`, both (B, 1, C, 1) in fp32."""

    scale: torch.Tensor
    shift: torch.Tensor

    def apply(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Writes the normalised `values` (B, F, C, P) to `out`, of the same shape and any layout, rounding once."""
        torch.addcmul(self.shift, values, self.scale, out=out)


def over_all_frames(execution: Execution, norm: nn.GroupNorm, values: torch.Tensor) -> ChannelAffine:
    """The first pass: `norm` for statistics over frames, height and width of `values` (B, F, C, P)."""
    mean, variance = _group_moments(execution, values, norm.num_groups)
    channels = values.shape[2]
    rstd = torch.rsqrt(variance + norm.eps).repeat_interleave(channels // norm.num_groups, dim=1)
    mean = mean.repeat_interleave(channels // norm.num_groups, dim=1)
    scale = rstd * norm.weight.float()
    shift = norm.bias.float() - mean * scale
    return ChannelAffine(scale=scale[:, None, :, None], shift=shift[:, None, :, None])


def _group_moments(execution: Execution, values: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (B, G) in fp32.

    Each piece of frames has its own mean and centred second moment; they are merged as in Chan, Golub and LeVeque,
    "Updating formulae and a pairwise algorithm for computing sample variances" (1979), so nothing large cancels.
    """
    batch, frames = values.shape[:2]
    mean = variance = torch.zeros(batch, groups, device=values.device)
    for piece in execution.pieces(frames, execution.chunk_size(frames, _frame_bytes(values))):
        grouped = values[:, piece].float().reshape(batch, piece.stop - piece.start, groups, -1)
        piece_variance, piece_mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
        del grouped  # not beside the next piece's
        share = (piece.stop - piece.start) / piece.stop
        apart = piece_mean - mean
        mean = mean + share * apart
        variance = variance.lerp(piece_variance, share) + share * (1 - share) * apart.square()
    return mean, variance


def statistics_bytes(execution: Execution, values: torch.Tensor) -> int:
    """The workspace of the first pass over `values` (B, F, C, P)."""
    unit_bytes = _frame_bytes(values)
    return execution.chunk_size(values.shape[1], unit_bytes) * unit_bytes


def _frame_bytes(values: torch.Tensor) -> int:
    batch, _, channels, pixels = values.shape
    return workspace.group_statistics(channels=channels, pixels=pixels, batch=batch, itemsize=values.element_size())
