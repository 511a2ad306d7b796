"""Temporary memory of a tiled causal layer beside the maps that it reads and writes, in bytes.

As in `workspace`, with past frames among those that are read.
"""

from __future__ import annotations

import torch

from .feature_map import FeatureMap
from .workspace import MemoryTerm, Workspace, row_bytes, write_term


def convolution(
    source: FeatureMap,
    target: FeatureMap,
    *,
    past_frames: int,
    halo: int,
    normed: bool,
    added: bool,
    doubles_frames: bool,
    offloads_past: bool,
) -> Workspace:
    """Return the workspace of a convolution over past and present frames, with `halo` rows above and below a tile.

    The peak is making the padded tile, or that beside the result. If `doubles_frames`, the result is there twice while
    channels are rearranged to frames.
    """
    making, padded = _padded_tile(source, past_frames, normed=normed, offloads_past=offloads_past)
    made = row_bytes(target)
    write = MemoryTerm(2 * made) if doubles_frames else write_term(target, added=added)
    return Workspace((MemoryTerm(making, 2 * halo * making), MemoryTerm(padded + made, 2 * halo * padded), write))


def output(source: FeatureMap, *, channels: int, past_frames: int, offloads_past: bool) -> Workspace:
    """Return the workspace of a convolution to `channels` channels whose result goes to host memory."""
    making, padded = _padded_tile(source, past_frames, normed=True, offloads_past=offloads_past)
    made = source.frames * channels * source.width * source.dtype.itemsize
    return Workspace((MemoryTerm(making, 2 * making), MemoryTerm(padded + made, 2 * padded), MemoryTerm(2 * made)))


def copy(source: FeatureMap) -> Workspace:
    """Return the workspace of copying a map's last frame."""
    frame = row_bytes(source) // source.frames
    return Workspace((MemoryTerm((row_bytes(source) if source.offloaded else 0) + frame),))


def attention(source: FeatureMap) -> int:
    """Return bytes a frame: the frame, its norm, and query, key and value twice: as projected, and made contiguous."""
    frame = row_bytes(source) // source.frames * source.height
    return (7 + (1 if source.offloaded else 0)) * frame


def upsampled_shortcut(source: FeatureMap, target: FeatureMap, *, times: int) -> Workspace:
    """Return the workspace of a `DupUp3D`, which makes two rows and `times` the frames of each row.

    The peak is its repeated and its rearranged tensor, or the latter and what it is added to.
    """
    target_frame = row_bytes(target) // target.frames
    made, onloaded = 2 * target_frame * source.frames * times, row_bytes(source) if source.offloaded else 0
    return Workspace((MemoryTerm(max(2 * made + onloaded, made + (4 * row_bytes(target) if target.offloaded else 0))),))


def downsampled_shortcut(source: FeatureMap, target: FeatureMap, *, factor: int) -> Workspace:
    """Return the workspace of an `AvgDown3D`, which pads `factor` source rows for each row in time, and rearranges
    them.
    """
    read = factor * row_bytes(source) // source.frames * (source.frames + source.frames % 2)
    onloaded = factor * row_bytes(source) if source.offloaded else 0
    return Workspace((MemoryTerm(onloaded + 2 * read), write_term(target, added=True)))


def _padded_tile(source: FeatureMap, past_frames: int, *, normed: bool, offloads_past: bool) -> tuple[int, int]:
    """Return bytes a row: the peak while a padded tile is made, and the padded tile itself.

    A `WanRMS_norm` in half precision makes an fp32 copy and an fp32 quotient, beside a length for each pixel; in fp32,
    a quotient and two products.
    """
    read = row_bytes(source)
    past = read // source.frames * past_frames
    onloaded = read if source.offloaded else 0
    half = source.dtype.itemsize < torch.float32.itemsize
    lengths = source.frames * source.width * torch.float32.itemsize
    norm = 4 * read + lengths if half else 3 * read
    padded = read + past
    return padded + max(onloaded + (norm if normed else 0), past if offloads_past else 0), padded
