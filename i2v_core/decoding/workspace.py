"""Temporary memory of a tiled layer beside the maps that it reads and writes, in bytes.

Each term is the memory that is alive at one line of the layer's code; the workspace is the largest term.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..memory.meter import rounded_bytes
from .feature_map import FeatureMap, moments_bytes


@dataclass(frozen=True, slots=True)
class MemoryTerm:
    """Memory alive at one line of a layer's code."""

    row_bytes: int
    """Bytes for each row of a tile."""

    border_bytes: int = 0
    """Bytes whatever the number of rows."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """The largest of some terms, and vectors of one number a channel beside it."""

    terms: tuple[MemoryTerm, ...]
    vectors_bytes: int = 0

    def size_bytes(self, rows: int) -> int:
        """Return the bytes of a tile of so many rows."""
        return max(term.row_bytes * rows + term.border_bytes for term in self.terms) + self.vectors_bytes

    def rows_within(self, limit_bytes: int) -> int:
        """Return how many rows fit; may be below 1."""
        return min((limit_bytes - term.border_bytes) // term.row_bytes for term in self.terms)


def convolution(source: FeatureMap, target: FeatureMap, *, added: bool = False) -> Workspace:
    """Return the workspace of a 3×3 convolution with a halo of one row.

    The peak is the onloaded rows of an offloaded source beside their padded copy, that copy beside the result, or the
    write.
    """
    read, made = row_bytes(source), row_bytes(target)
    onloaded = read if source.offloaded else 0
    terms = (
        MemoryTerm(onloaded + read, 2 * (onloaded + read)),
        MemoryTerm(read + made, 2 * read),
        write_term(target, added=added),
    )
    return Workspace(terms, _affine_bytes(source))


def upsample(source: FeatureMap, target: FeatureMap) -> Workspace:
    """Return the workspace of upsampling and a 3×3 convolution; one source row makes two rows of the result."""
    read, made = row_bytes(source), row_bytes(target)
    onloaded = read if source.offloaded else 0
    padded = 2 * read
    return Workspace(
        (
            MemoryTerm(onloaded // 2 + read, 2 * (onloaded + read)),
            MemoryTerm(read + padded, 2 * (read + padded)),
            MemoryTerm(padded + made, 2 * padded),
            write_term(target),
        )
    )


def downsample(source: FeatureMap, target: FeatureMap) -> Workspace:
    """Return the workspace of a 3×3 convolution with a stride of two, which reads two rows for each of the result."""
    read, made = row_bytes(source), row_bytes(target)
    column = source.frames * source.channels * source.dtype.itemsize
    onloaded, padded = (read if source.offloaded else 0), read + column
    return Workspace(
        (
            MemoryTerm(2 * (onloaded + padded), onloaded + padded),
            MemoryTerm(2 * padded + made, padded),
            write_term(target),
        )
    )


def pointwise(source: FeatureMap, target: FeatureMap) -> Workspace:
    """Return the workspace of a 1×1 convolution."""
    read, made = row_bytes(source), row_bytes(target)
    return Workspace((MemoryTerm((read if source.offloaded else 0) + made), write_term(target)))


def output(source: FeatureMap, channels: int) -> Workspace:
    """Return the workspace of a 3×3 convolution whose result goes to host memory at once."""
    read = row_bytes(source)
    made = source.frames * channels * source.width * source.dtype.itemsize
    onloaded = read if source.offloaded else 0
    return Workspace(
        (MemoryTerm(onloaded + read, 2 * (onloaded + read)), MemoryTerm(read + made, 2 * read)), _affine_bytes(source)
    )


def temporal_convolve(source: FeatureMap, target: FeatureMap, *, added: bool = False) -> Workspace:
    """Return the workspace of a temporal convolution.

    The peak is the onloaded rows of an offloaded source beside their normalised copy, that copy beside the result, or
    the write.
    """
    read, made = row_bytes(source), row_bytes(target)
    onloaded = read if source.offloaded else 0
    terms = (MemoryTerm(onloaded + read), MemoryTerm(read + made), write_term(target, added=added))
    return Workspace(terms, _affine_bytes(source))


def temporal_output(source: FeatureMap, channels: int) -> Workspace:
    """Return the workspace of a temporal convolution whose result goes to host memory at once."""
    read = row_bytes(source)
    made = source.frames * channels * source.width * source.dtype.itemsize
    return Workspace((MemoryTerm((read if source.offloaded else 0) + read), MemoryTerm(read + made)))


def attention(source: FeatureMap) -> int:
    """Return bytes a frame: input, norm, query, key, value, and two of attention's output, projection and sum."""
    return 7 * row_bytes(source) * source.height // source.frames


def _affine_bytes(source: FeatureMap) -> int:
    """Return bytes of a normalisation's scale, shift and moments, and of the fp32 vectors that they are made of."""
    return 8 * rounded_bytes(source.frames * source.channels * torch.float32.itemsize)


def write_term(target: FeatureMap, *, added: bool = False) -> MemoryTerm:
    """Return the term of writing the result: the result beside the largest of three.

    These are the onloaded rows that it is added to, its moments' fp32 copy, and its contiguous copy for host memory.
    """
    made = row_bytes(target)
    onloaded = made if target.offloaded else 0
    return MemoryTerm(made + max(onloaded if added else 0, moments_bytes(target), onloaded))


def row_bytes(feature_map: FeatureMap) -> int:
    """Return bytes of one row of a map over all frames."""
    return feature_map.frames * feature_map.channels * feature_map.width * feature_map.dtype.itemsize
