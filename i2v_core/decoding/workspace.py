"""What a layer in bands takes beside the maps that it reads and writes, in bytes: what is alive at its worst line.

Legend: N frames, C channels in, K channels out, r rows of a band, W width of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..memory.meter import rounded_bytes
from .feature_map import FeatureMap, moments_bytes


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """`row_bytes` for each row of a band, and `border_bytes` whatever its rows."""

    row_bytes: int
    border_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Workspace:
    """The largest of some lines, and vectors of one number a channel beside it."""

    lines: tuple[MemoryTerm, ...]
    vectors_bytes: int = 0

    def of(self, rows: int) -> int:
        return max(line.row_bytes * rows + line.border_bytes for line in self.lines) + self.vectors_bytes

    def rows_within(self, limit_bytes: int) -> int:
        """How many rows fit; may be below 1."""
        return min((limit_bytes - line.border_bytes) // line.row_bytes for line in self.lines)


def convolution(source: FeatureMap, target: FeatureMap, *, added: bool = False) -> Workspace:
    """3×3 with a row above and below: what is fetched of a parked source and its padded copy, that and the result."""
    read, made = row_bytes(source), row_bytes(target)
    fetched = read if source.parked else 0
    lines = (
        MemoryTerm(fetched + read, 2 * (fetched + read)),
        MemoryTerm(read + made, 2 * read),
        written(target, added=added),
    )
    return Workspace(lines, _affine_bytes(source))


def doubling(source: FeatureMap, target: FeatureMap) -> Workspace:
    """3×3 on each pixel twice in both directions: a source row is half as wide, and serves two rows of the result."""
    read, made = row_bytes(source), row_bytes(target)
    fetched = read if source.parked else 0
    padded = 2 * read
    return Workspace(
        (
            MemoryTerm(fetched // 2 + read, 2 * (fetched + read)),
            MemoryTerm(read + padded, 2 * (read + padded)),
            MemoryTerm(padded + made, 2 * padded),
            written(target),
        )
    )


def halving(source: FeatureMap, target: FeatureMap) -> Workspace:
    """3×3 with a stride of two: two rows for each of the result and one more, and a column more."""
    read, made = row_bytes(source), row_bytes(target)
    column = source.frames * source.channels * source.dtype.itemsize
    fetched, padded = (read if source.parked else 0), read + column
    return Workspace(
        (MemoryTerm(2 * (fetched + padded), fetched + padded), MemoryTerm(2 * padded + made, padded), written(target))
    )


def pointwise(source: FeatureMap, target: FeatureMap) -> Workspace:
    read, made = row_bytes(source), row_bytes(target)
    return Workspace((MemoryTerm((read if source.parked else 0) + made), written(target)))


def last(source: FeatureMap, channels: int) -> Workspace:
    """A convolution whose result goes to host memory at once."""
    read = row_bytes(source)
    made = source.frames * channels * source.width * source.dtype.itemsize
    fetched = read if source.parked else 0
    return Workspace(
        (MemoryTerm(fetched + read, 2 * (fetched + read)), MemoryTerm(read + made, 2 * read)), _affine_bytes(source)
    )


def along_time(source: FeatureMap, target: FeatureMap, *, added: bool = False) -> Workspace:
    """A convolution over frames: what is fetched of a parked source and its normalised copy, that and the result."""
    read, made = row_bytes(source), row_bytes(target)
    fetched = read if source.parked else 0
    lines = (MemoryTerm(fetched + read), MemoryTerm(read + made), written(target, added=added))
    return Workspace(lines, _affine_bytes(source))


def last_along_time(source: FeatureMap, channels: int) -> Workspace:
    """The same, with a result that goes to host memory at once."""
    read = row_bytes(source)
    made = source.frames * channels * source.width * source.dtype.itemsize
    return Workspace((MemoryTerm((read if source.parked else 0) + read), MemoryTerm(read + made)))


def attention(source: FeatureMap) -> int:
    """Bytes a frame. Seven maps: the input, its norm, query, key, value, and two of: attention's output, the
    projection, the sum.
    """
    return 7 * row_bytes(source) * source.height // source.frames


def _affine_bytes(source: FeatureMap) -> int:
    """Scale and shift of a normalisation, and what they and the moments are made of, in fp32."""
    return 8 * rounded_bytes(source.frames * source.channels * torch.float32.itemsize)


def written(target: FeatureMap, *, added: bool = False) -> MemoryTerm:
    """The result, and the most of: what it is added to, fetched; its moments' fp32 copy; its copy for host memory."""
    made = row_bytes(target)
    fetched = made if target.parked else 0
    return MemoryTerm(made + max(fetched if added else 0, moments_bytes(target), fetched))


def row_bytes(feature_map: FeatureMap) -> int:
    return feature_map.frames * feature_map.channels * feature_map.width * feature_map.dtype.itemsize
