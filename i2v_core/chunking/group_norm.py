"""Group normalisation whose statistics span more than a chunk: two passes, as exact as one.

Legend: B batch, F frames, C channels, P pixels (height × width, or a strip of them), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import workspace
from .execution import Execution, Pieces


class GroupMoments:
    """Mean and biased variance (B, G) in fp32, of values that come a piece at a time.

    Each piece has its own mean and centred second moment; they are merged as in Chan, Golub and LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances" (1979), so nothing large cancels.
    """

    def __init__(self, batch: int, groups: int, device: torch.device) -> None:
        self.mean = torch.zeros(batch, groups, device=device)
        self.variance = torch.zeros_like(self.mean)
        self._seen = [0] * batch

    def add(self, mean: torch.Tensor, variance: torch.Tensor, count: int, of: slice = slice(None)) -> None:
        """Merges the moments (b, G) of a further piece of `count` values a group; `of`: of these of the batch, which
        have seen as much as one another.
        """
        seen = self._seen[of][0] + count
        self._seen[of] = [seen] * len(mean)
        share = count / seen
        apart = mean - self.mean[of]
        self.mean[of] += share * apart
        self.variance[of] = self.variance[of].lerp(variance, share) + share * (1 - share) * apart.square()

    def pooled(self) -> GroupMoments:
        """The moments (1, G) of the whole batch, whose members have seen as much as one another."""
        pooled = GroupMoments(1, self.mean.shape[1], self.mean.device)
        between, mean = torch.var_mean(self.mean, dim=0, correction=0, keepdim=True)
        pooled.add(mean, self.variance.mean(dim=0, keepdim=True) + between, sum(self._seen))
        return pooled

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """What `norm` makes of values with these moments: `values × scale + shift`, both (B, C) in fp32."""
        width = norm.num_channels // norm.num_groups
        scale = torch.rsqrt(self.variance + norm.eps).repeat_interleave(width, dim=1) * norm.weight.float()
        shift = norm.bias.float() - self.mean.repeat_interleave(width, dim=1) * scale
        return scale, shift


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
    scale, shift = _group_moments(execution, values, norm.num_groups).scale_and_shift(norm)
    return ChannelAffine(scale=scale[:, None, :, None], shift=shift[:, None, :, None])


def _group_moments(execution: Execution, values: torch.Tensor, groups: int) -> GroupMoments:
    batch, frames = values.shape[:2]
    moments = GroupMoments(batch, groups, values.device)
    size = statistics(values).size(execution.settings.workspace_bytes)
    for piece in execution.pieces(frames, size):
        grouped = values[:, piece].float().reshape(batch, piece.stop - piece.start, groups, -1)
        variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
        count = grouped[:, :, 0].numel() // batch
        del grouped  # not beside the next piece's
        moments.add(mean, variance, count)
    return moments


def statistics(values: torch.Tensor) -> Pieces:
    """The first pass over the frames of `values` (B, F, C, P)."""
    batch, frames, channels, pixels = values.shape
    unit_bytes = workspace.group_statistics(
        channels=channels, pixels=pixels, batch=batch, itemsize=values.element_size()
    )
    return Pieces(total=frames, unit_bytes=unit_bytes)
