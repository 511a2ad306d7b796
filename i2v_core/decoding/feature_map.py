"""What one layer passes on to the next, read and written a band of rows at a time.

Legend: N frames, C channels, H rows of the whole map, r rows of a band, W width, G groups.
"""

from __future__ import annotations

from math import gcd
from weakref import WeakSet

import torch

from ..chunking.group_norm import GroupMoments
from ..memory.meter import rounded_bytes
from ..placement.offload import empty_offloaded, fetch

# Statistics in fp32 take a copy of what is in half precision: of so many groups at a time.
_GROUPS_AT_ONCE = 8


class FeatureMap:
    """Feature planes (N, C, H, W) on the device, or parked in host memory; made by `FeatureMaps`.

    Rows are outermost in memory, so that a band of them is one block: that is what copies to and from a device are
    fast with. Of a map of groups the moments of what is written are gathered.
    """

    def __init__(self, rows_HNCW: torch.Tensor, device: torch.device, *, parked: bool, groups: int) -> None:
        self.height, self.frames, self.channels, self.width = rows_HNCW.shape
        self.device, self.parked, self.groups = device, parked, groups
        self._rows_HNCW = rows_HNCW
        self.overwritten()

    @classmethod
    def over(cls, source_NCHW: torch.Tensor) -> FeatureMap:
        """A tensor on the device as a map that is only read, and that no normalisation follows."""
        return cls(source_NCHW.permute(2, 0, 1, 3), source_NCHW.device, parked=False, groups=1)

    @property
    def moments(self) -> GroupMoments:
        """Those of all that has been written."""
        assert self._moments is not None, "without groups there are none"
        return self._moments

    @property
    def size_bytes(self) -> int:
        return rounded_bytes(self._rows_HNCW.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        return self._rows_HNCW.dtype

    def read(self, rows: slice, frames: slice = slice(None)) -> torch.Tensor:
        """A band (N, C, r, W) on the device, of some frames: a view, or a copy of what is parked."""
        band_rNCW = self._rows_HNCW[rows, frames]
        return (fetch(band_rNCW, self.device) if self.parked else band_rNCW).permute(1, 2, 0, 3)

    def write(self, rows: slice, band_NCrW: torch.Tensor, frames: slice = slice(None)) -> None:
        """Every row of every frame is to be written once, or the moments are void."""
        if self.groups:
            self._add_moments(band_NCrW, frames)
        band_rNCW, target_rNCW = band_NCrW.permute(2, 0, 1, 3), self._rows_HNCW[rows, frames]
        if self.parked:
            target_rNCW.copy_(band_rNCW.contiguous(), non_blocking=self.device.type == "cuda")
        else:
            target_rNCW.copy_(band_rNCW)

    def overwritten(self) -> FeatureMap:
        """The map, about to be written anew; its moments begin again."""
        self._moments = GroupMoments(self.frames, self.groups, self.device) if self.groups else None
        return self

    def _add_moments(self, band_NCrW: torch.Tensor, frames: slice) -> None:
        grouped = band_NCrW.reshape(len(band_NCrW), self.groups, -1, *band_NCrW.shape[2:])
        pieces = [
            torch.var_mean(grouped[:, start : start + _GROUPS_AT_ONCE].float(), dim=(2, 3, 4), correction=0)
            for start in range(0, self.groups, _GROUPS_AT_ONCE)
        ]
        variance, mean = (torch.cat(values, dim=1) for values in zip(*pieces, strict=True))
        self.moments.add(mean, variance, count=grouped[0, 0].numel(), of=frames)


def moments_bytes(feature_map: FeatureMap) -> int:
    """What the moments of a row take while they are taken: a copy in fp32 of some groups; none of what is in fp32."""
    if feature_map.dtype is torch.float32 or not feature_map.groups:
        return 0
    numbers = feature_map.frames * feature_map.channels * feature_map.width
    return numbers * min(_GROUPS_AT_ONCE, feature_map.groups) // feature_map.groups * torch.float32.itemsize


class FeatureMaps:
    """Gives out feature maps: on the device while they take no more than `limit_bytes` together, else parked.

    `groups` are those of the normalisations that follow; 0 where none goes by the statistics of a map.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, limit_bytes: int | None, groups: int) -> None:
        self._device, self._dtype, self._limit_bytes, self._groups = device, dtype, limit_bytes, groups
        self._on_device: WeakSet[FeatureMap] = WeakSet()

    def new(self, frames: int, channels: int, height: int, width: int, *, waits: bool = False) -> FeatureMap:
        """`waits`: for more than the next layer, so that it is parked wherever there is a limit."""
        shape = (height, frames, channels, width)
        size_bytes = rounded_bytes(height * frames * channels * width * self._dtype.itemsize)
        limit_bytes = self._limit_bytes
        parked = limit_bytes is not None and (waits or self._taken_bytes + size_bytes > limit_bytes)
        if parked:
            rows_HNCW = empty_offloaded(shape, self._dtype, self._device)
        else:
            rows_HNCW = torch.empty(shape, dtype=self._dtype, device=self._device)
        # What no group normalisation can follow, such as a picture's three channels, has moments all the same.
        groups = gcd(self._groups, channels) if self._groups else 0
        made = FeatureMap(rows_HNCW, self._device, parked=parked, groups=groups)
        if not parked:
            self._on_device.add(made)
        return made

    @property
    def _taken_bytes(self) -> int:
        return sum(it.size_bytes for it in self._on_device)
