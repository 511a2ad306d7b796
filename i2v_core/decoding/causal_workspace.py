"""What a causal layer in bands takes beside the maps that it reads and writes, in bytes.

As in `workspace`, with the frames before among what is read.
"""

from __future__ import annotations

import torch

from .feature_map import FeatureMap
from .workspace import MemoryTerm, Workspace, row_bytes, written


def convolution(
    source: FeatureMap,
    target: FeatureMap,
    *,
    past_frames: int,
    halo: int,
    normed: bool,
    added: bool,
    doubled: bool,
    parks_past: bool,
) -> Workspace:
    """Frames before and now, with `halo` rows above and below: what these are made of, or what is made of them.

    `doubled`: the result is put into another order, which takes it twice.
    """
    making, padded = _around(source, past_frames, normed=normed, parks_past=parks_past)
    made = row_bytes(target)
    put = MemoryTerm(2 * made) if doubled else written(target, added=added)
    return Workspace((MemoryTerm(making, 2 * halo * making), MemoryTerm(padded + made, 2 * halo * padded), put))


def last(source: FeatureMap, *, channels: int, past_frames: int, parks_past: bool) -> Workspace:
    """A convolution of so many channels whose result goes to host memory."""
    making, padded = _around(source, past_frames, normed=True, parks_past=parks_past)
    made = source.frames * channels * source.width * source.dtype.itemsize
    return Workspace((MemoryTerm(making, 2 * making), MemoryTerm(padded + made, 2 * padded), MemoryTerm(2 * made)))


def copy(source: FeatureMap) -> Workspace:
    """A map's last frame, put by."""
    frame = row_bytes(source) // source.frames
    return Workspace((MemoryTerm((row_bytes(source) if source.parked else 0) + frame),))


def attention(source: FeatureMap) -> int:
    """Bytes a frame: it, its norm, and twice query, key and value: as the projection gives them, and in a row."""
    frame = row_bytes(source) // source.frames * source.height
    return (7 + (1 if source.parked else 0)) * frame


def enlarged(source: FeatureMap, target: FeatureMap, *, times: int) -> Workspace:
    """For each row of the source two of the target, and `times` the frames: as `DupUp3D` makes them, twice; and what
    they are added to.
    """
    target_frame = row_bytes(target) // target.frames
    made, fetched = 2 * target_frame * source.frames * times, row_bytes(source) if source.parked else 0
    return Workspace((MemoryTerm(max(2 * made + fetched, made + (4 * row_bytes(target) if target.parked else 0))),))


def reduced(source: FeatureMap, target: FeatureMap, *, factor: int) -> Workspace:
    """For each row of the target `factor` of the source: padded in time and put into another order by `AvgDown3D`."""
    read = factor * row_bytes(source) // source.frames * (source.frames + source.frames % 2)
    fetched = factor * row_bytes(source) if source.parked else 0
    return Workspace((MemoryTerm(fetched + 2 * read), written(target, added=True)))


def _around(source: FeatureMap, past_frames: int, *, normed: bool, parks_past: bool) -> tuple[int, int]:
    """Bytes of a row: the most while a padded band is made, and of the band itself.

    A `WanRMS_norm` of half precision makes an fp32 copy and an fp32 quotient, beside a length for each pixel; of fp32 a
    quotient and two products.
    """
    read = row_bytes(source)
    past = read // source.frames * past_frames
    fetched = read if source.parked else 0
    half = source.dtype.itemsize < torch.float32.itemsize
    lengths = source.frames * source.width * torch.float32.itemsize
    norm = 4 * read + lengths if half else 3 * read
    padded = read + past
    return padded + max(fetched + (norm if normed else 0), past if parks_past else 0), padded
