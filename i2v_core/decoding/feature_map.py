"""Feature maps: what one layer passes on to the next, read and written a tile of rows at a time.

Legend: N frames, C channels, H rows of the map, r rows of a tile, W width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from weakref import WeakSet

import torch

from ..chunking.group_norm import GroupMoments
from ..memory.device import is_out_of_memory
from ..memory.meter import rounded_bytes
from ..placement.offload import empty_offloaded, onload

# Statistics need an fp32 copy of values in half precision, which is made of so many groups at a time.
_GROUPS_AT_ONCE = 8


class FeatureMap:
    """Feature planes (N, C, H, W) on the device, or offloaded to host memory; made by `FeatureMaps`.

    Rows are outermost in memory, so that a tile is one contiguous block, which is fast to copy to and from a device. If
    `groups` is not 0, the moments of each group are gathered while the map is written.
    """

    def __init__(self, rows_HNCW: torch.Tensor, device: torch.device, *, offloaded: bool, groups: int) -> None:
        self.height, self.frames, self.channels, self.width = rows_HNCW.shape
        self.device, self.offloaded, self.groups = device, offloaded, groups
        self._rows_HNCW = rows_HNCW
        self.reset()

    @classmethod
    def view_of(cls, source_NCHW: torch.Tensor) -> FeatureMap:
        """Return a map over a tensor on the device, which may only be read, and not be normalised."""
        return cls(source_NCHW.permute(2, 0, 1, 3), source_NCHW.device, offloaded=False, groups=1)

    def offload(self) -> None:
        """Move the map to host memory."""
        rows_HNCW = empty_offloaded(tuple(self._rows_HNCW.shape), self.dtype, self.device)
        rows_HNCW.copy_(self._rows_HNCW, non_blocking=self.device.type == "cuda")
        self._rows_HNCW, self.offloaded = rows_HNCW, True

    def part(self, frames: slice) -> FeatureMap:
        """Return a map over some of the frames, whose rows are those of this map."""
        return FeatureMap(self._rows_HNCW[:, frames], self.device, offloaded=self.offloaded, groups=self.groups)

    @property
    def moments(self) -> GroupMoments:
        """Moments of all values that have been written."""
        assert self._moments is not None, "a map without groups gathers no moments"
        return self._moments

    @property
    def size_bytes(self) -> int:
        return rounded_bytes(self._rows_HNCW.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        return self._rows_HNCW.dtype

    def read(self, rows: slice, frames: slice = slice(None)) -> torch.Tensor:
        """Return a tile (N, C, r, W) of some frames on the device: a view, or a copy of an offloaded map."""
        tile_rNCW = self._rows_HNCW[rows, frames]
        return (onload(tile_rNCW, self.device) if self.offloaded else tile_rNCW).permute(1, 2, 0, 3)

    def write(self, rows: slice, tile_NCrW: torch.Tensor, frames: slice = slice(None)) -> None:
        """Write a tile. Moments are right only if every row of every frame has been written exactly once."""
        if self.groups:
            self._add_moments(tile_NCrW, frames)
        tile_rNCW, target_rNCW = tile_NCrW.permute(2, 0, 1, 3), self._rows_HNCW[rows, frames]
        if self.offloaded:
            target_rNCW.copy_(tile_rNCW.contiguous(), non_blocking=self.device.type == "cuda")
        else:
            target_rNCW.copy_(tile_rNCW)

    def reset(self) -> FeatureMap:
        """Start the moments anew, before the map is overwritten; returns the map."""
        self._moments = GroupMoments(self.frames, self.groups, self.device) if self.groups else None
        return self

    def _add_moments(self, tile_NCrW: torch.Tensor, frames: slice) -> None:
        grouped = tile_NCrW.reshape(len(tile_NCrW), self.groups, -1, *tile_NCrW.shape[2:])
        parts = [
            torch.var_mean(grouped[:, start : start + _GROUPS_AT_ONCE].float(), dim=(2, 3, 4), correction=0)
            for start in range(0, self.groups, _GROUPS_AT_ONCE)
        ]
        variance, mean = (torch.cat(values, dim=1) for values in zip(*parts, strict=True))
        self.moments.add(mean, variance, count=grouped[0, 0].numel(), members=frames)


def moments_bytes(feature_map: FeatureMap) -> int:
    """Return bytes that computing a row's moments takes: an fp32 copy of some groups, or none if the map is in fp32."""
    if feature_map.dtype is torch.float32 or not feature_map.groups:
        return 0
    numbers = feature_map.frames * feature_map.channels * feature_map.width
    return numbers * min(_GROUPS_AT_ONCE, feature_map.groups) // feature_map.groups * torch.float32.itemsize


class FeatureMaps:
    """Allocates feature maps: on the device while they take no more than `limit_bytes` together, else offloaded.

    Args:
        groups: the number of groups of the normalisations that follow; 0 if none uses statistics of a map.
        on_full: called with the error where the device has no memory left for a map, which then is offloaded, as are
            all that would not have fitted with it. None: the error is raised.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        limit_bytes: int | None,
        groups: int,
        on_full: Callable[[str], None] | None = None,
    ) -> None:
        self._device, self._dtype, self._limit_bytes, self._groups = device, dtype, limit_bytes, groups
        self._on_full = on_full
        self._on_device: WeakSet[FeatureMap] = WeakSet()
        self._long_lived: WeakSet[FeatureMap] = WeakSet()

    def new(self, frames: int, channels: int, height: int, width: int, *, long_lived: bool = False) -> FeatureMap:
        """Allocate a map; a `long_lived` one outlives the next layer, and so is offloaded wherever there is a limit."""
        shape = (height, frames, channels, width)
        size_bytes = rounded_bytes(height * frames * channels * width * self._dtype.itemsize)
        limit_bytes = self._limit_bytes
        offloaded = limit_bytes is not None and (long_lived or self._device_bytes + size_bytes > limit_bytes)
        rows_HNCW = None if offloaded else self._empty_on_device(shape)
        if rows_HNCW is None:
            rows_HNCW, offloaded = empty_offloaded(shape, self._dtype, self._device), True
        # Channels that the groups do not divide, such as a picture's three, are never normalised; any groups will do.
        groups = gcd(self._groups, channels) if self._groups else 0
        made = FeatureMap(rows_HNCW, self._device, offloaded=offloaded, groups=groups)
        if not offloaded:
            self._on_device.add(made)
            if long_lived:
                self._long_lived.add(made)
        return made

    def make_room(self, *, only_long_lived: bool) -> bool:
        """Offload maps that are on the device, after it ran out of memory, and limit further ones to what is left.

        Returns whether there was one.
        """
        moved = [it for it in self._on_device if it in self._long_lived or not only_long_lived]
        for feature_map in moved:
            feature_map.offload()
            self._on_device.discard(feature_map)
        if moved or not only_long_lived:
            self._limit_bytes = self._device_bytes
        return bool(moved)

    def _empty_on_device(self, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Return an empty tensor on the device, or None where that is full and the map may be offloaded instead."""
        try:
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        except RuntimeError as error:
            if self._on_full is None or not is_out_of_memory(error):
                raise
            self._limit_bytes = self._device_bytes
            self._on_full(str(error))
            return None

    @property
    def _device_bytes(self) -> int:
        return sum(it.size_bytes for it in self._on_device)
