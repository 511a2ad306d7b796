"""Latent files, so that a decode can be repeated alone.

A file is safetensors, with the tensor under the name that the host's own `.latent` files use, so that each can read the
other's. The header holds the latent's facts as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import BadInputError, FileError
from .families import FamilyFacts, VideoSize, family_of
from .files import atomic_file, file_errors
from .planning.plan import Plan

SUFFIX = ".latent"
_TENSOR = "latent_tensor"
_UNSCALED = "latent_format_version_0"
"""Name whose presence marks an unscaled tensor; the host's older files are scaled by Stable Diffusion 1's factor."""
_OLD_SCALE = 0.18215
_FACTS, _VERSION = "i2v_latent", 1
_HOST_COMPRESSION = 8
"""Pixels a latent pixel in the host's own files, which do not record it."""

_LENGTH_BYTES = 8
_REMEDY = "save the latent again with I2V Save Latent, or choose another file"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFacts:
    """Facts of a latent: its video's size, and the model that made it (empty if the file does not record it)."""

    size: VideoSize
    family: str = ""
    fingerprint: str = ""
    guidance: bool = True

    def __str__(self) -> str:
        return f"{self.size}, made with {self.family}" if self.family else str(self.size)


def save_latent(path: Path, samples: Tensor, plan: Plan, metadata: Mapping[str, str] | None = None) -> LatentFacts:
    """Write the host's LATENT samples, made with the plan's model; returns their facts.

    Args:
        path: the file to write.
        samples: unscaled latents.
        plan: the plan that they were made with.
        metadata: texts to store in the header.

    Raises:
        BadInputError: the samples do not have the shape of the plan's model.
        FileError: the file cannot be written; then there is none.
    """
    architecture = plan.request.architecture
    facts = LatentFacts(
        size=_size(samples, family_of(architecture).facts),
        family=architecture.family,
        fingerprint=architecture.fingerprint,
        guidance=plan.request.guidance,
    )
    tensors = {_TENSOR: samples.detach().cpu().contiguous(), _UNSCALED: torch.empty(0)}
    content = safetensors.torch.save(tensors, {**(metadata or {}), _FACTS: _to_json(facts)})
    with atomic_file(path) as temporary, file_errors(path):
        temporary.write_bytes(content)
    return facts


def load_latent(path: Path) -> tuple[Tensor, LatentFacts]:
    """Return the samples in fp32 and their facts; also reads the host's own files of one latent a frame.

    Raises:
        FileError: there is no such file, or it is truncated, damaged, or no latent.
    """
    content = _read(path)
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise FileError(f"{path} is damaged, or no latent ({error})", _REMEDY) from error
    samples = tensors.get(_TENSOR)
    if samples is None:
        raise FileError(f"{path} holds no latent but {', '.join(sorted(tensors)[:3]) or 'nothing'}", _REMEDY)
    facts = _read_facts(path, content, samples)
    return samples.float() if _UNSCALED in tensors else samples.float() / _OLD_SCALE, facts


def _size(samples: Tensor, facts: FamilyFacts) -> VideoSize:
    """Return the size in pixels of samples (frames, C, h, w), or (1, C, T, h, w) for a video autoencoder."""
    channels, dimensions = facts.latent_channels, 4 if facts.temporal_compression == 1 else 5
    if samples.ndim != dimensions or samples.shape[1] != channels or 0 in samples.shape:
        raise BadInputError(
            f"the latent has shape {tuple(samples.shape)}, which is none of {facts.display_name}",
            "connect the LATENT of Chunked Sampler, and the plan that it was made with",
        )
    latent_frames = samples.shape[0] if dimensions == 4 else samples.shape[2]
    return VideoSize(
        width_pixels=samples.shape[-1] * facts.spatial_compression,
        height_pixels=samples.shape[-2] * facts.spatial_compression,
        frames=(latent_frames - 1) * facts.temporal_compression + 1,
    )


def _read(path: Path) -> bytes:
    """Return the file's content, after a check that its header's length is possible."""
    try:
        with path.open("rb") as file:
            length_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            size_bytes = path.stat().st_size
            if size_bytes <= _LENGTH_BYTES or length_bytes > size_bytes - _LENGTH_BYTES:
                raise FileError(f"{path} is cut off, or no latent ({size_bytes} bytes)", _REMEDY)
            file.seek(0)
            return file.read()
    except OSError as error:
        raise FileError(f"{path} cannot be read ({error.strerror or error})", _REMEDY) from error


def _read_facts(path: Path, content: bytes, samples: Tensor) -> LatentFacts:
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(content[_LENGTH_BYTES:end])
    stored = cast("dict[str, str]", header.get("__metadata__") or {}).get(_FACTS)
    if stored is not None:
        return _from_json(path, stored)
    if samples.ndim != 4 or 0 in samples.shape:
        raise FileError(f"{path} holds a latent of shape {tuple(samples.shape)}, not one a frame", _REMEDY)
    frames, _, height, width = samples.shape
    return LatentFacts(
        size=VideoSize(width_pixels=width * _HOST_COMPRESSION, height_pixels=height * _HOST_COMPRESSION, frames=frames)
    )


def _to_json(facts: LatentFacts) -> str:
    return json.dumps(
        {
            "version": _VERSION,
            "family": facts.family,
            "fingerprint": facts.fingerprint,
            "width": facts.size.width_pixels,
            "height": facts.size.height_pixels,
            "frames": facts.size.frames,
            "guidance": facts.guidance,
        }
    )


def _from_json(path: Path, text: str) -> LatentFacts:
    try:
        stored: dict[str, Any] = json.loads(text)
        if stored["version"] != _VERSION:
            raise FileError(
                f"{path} is of format version {stored['version']}, and this is made for {_VERSION}",
                "use the pack's version that saved it",
            )
        size = VideoSize(
            width_pixels=int(stored["width"]), height_pixels=int(stored["height"]), frames=int(stored["frames"])
        )
        return LatentFacts(
            size=size,
            family=str(stored["family"]),
            fingerprint=str(stored["fingerprint"]),
            guidance=bool(stored["guidance"]),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise FileError(f"{path} does not say properly what it is of ({error!r})", _REMEDY) from error
