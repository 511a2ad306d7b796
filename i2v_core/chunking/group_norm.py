"""Group normalisation whose statistics span more than one chunk, in two passes.

The first pass gathers mean and variance chunk by chunk in fp32, the second scales and shifts the values.

Legend: B batch, F frames, C channels, P pixels (height × width, or a chunk of them), G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from . import workspace
from .execution import ChunkableWork, Execution


class GroupMoments:
    """Mean and biased variance (B, G) in fp32 of values that arrive in chunks.

    Chunks are merged by their means and centred second moments, as in Chan, Golub and LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances" (1979): unlike a sum of squares, that loses no digits where the
    mean is large.
    """

    def __init__(self, batch: int, groups: int, device: torch.device) -> None:
        self.mean = torch.zeros(batch, groups, device=device)
        self.variance = torch.zeros_like(self.mean)
        self._seen = [0] * batch

    def add(self, mean: torch.Tensor, variance: torch.Tensor, count: int, members: slice = slice(None)) -> None:
        """Merge the moments (b, G) of a further chunk.

        Args:
            mean, variance: the chunk's own, for each member and group.
            count: values that the chunk has for each member and group.
            members: members of the batch that the chunk belongs to; they must have received equally many values so far.
        """
        seen = self._seen[members][0] + count
        self._seen[members] = [seen] * len(mean)
        share = count / seen
        difference = mean - self.mean[members]
        self.mean[members] += share * difference
        between = share * (1 - share) * difference.square()
        self.variance[members] = self.variance[members].lerp(variance, share) + between

    def pooled(self) -> GroupMoments:
        """Return the moments (1, G) over all members of the batch, which must have received equally many values."""
        pooled = GroupMoments(1, self.mean.shape[1], self.mean.device)
        between, mean = torch.var_mean(self.mean, dim=0, correction=0, keepdim=True)
        pooled.add(mean, self.variance.mean(dim=0, keepdim=True) + between, sum(self._seen))
        return pooled

    def scale_and_shift(self, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and shift (B, C), in fp32, with which `norm(values)` is `values × scale + shift`."""
        width = norm.num_channels // norm.num_groups
        scale = torch.rsqrt(self.variance + norm.eps).repeat_interleave(width, dim=1) * norm.weight.float()
        shift = norm.bias.float() - self.mean.repeat_interleave(width, dim=1) * scale
        return scale, shift


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAffine:
    """Group normalisation with known statistics: `values × scale + shift`, both (B, 1, C, 1) in fp32."""

    scale: torch.Tensor
    shift: torch.Tensor

    def apply(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write the normalised `values` (B, F, C, P) to `out`, of the same shape and any layout; rounds once."""
        torch.addcmul(self.shift, values, self.scale, out=out)


def norm_over_frames(execution: Execution, norm: nn.GroupNorm, values: torch.Tensor) -> ChannelAffine:
    """Run the first pass over `values` (B, F, C, P), and return `norm` with their statistics over frames and pixels."""
    scale, shift = _group_moments(execution, values, norm.num_groups).scale_and_shift(norm)
    return ChannelAffine(scale=scale[:, None, :, None], shift=shift[:, None, :, None])


def _group_moments(execution: Execution, values: torch.Tensor, groups: int) -> GroupMoments:
    batch, frames = values.shape[:2]
    moments = GroupMoments(batch, groups, values.device)
    size = statistics_pass(values).chunk_size(execution.settings.workspace_bytes)
    for chunk in execution.chunk_slices(frames, size):
        grouped = values[:, chunk].float().reshape(batch, chunk.stop - chunk.start, groups, -1)
        variance, mean = torch.var_mean(grouped, dim=(1, 3), correction=0)
        count = grouped[:, :, 0].numel() // batch
        del grouped  # or it would be alive beside the next chunk's
        moments.add(mean, variance, count)
    return moments


def statistics_pass(values: torch.Tensor) -> ChunkableWork:
    """Return the work of the first pass over the frames of `values` (B, F, C, P)."""
    batch, frames, channels, pixels = values.shape
    unit_bytes = workspace.group_statistics(
        channels=channels, pixels=pixels, batch=batch, itemsize=values.element_size()
    )
    return ChunkableWork(total=frames, unit_bytes=unit_bytes)
