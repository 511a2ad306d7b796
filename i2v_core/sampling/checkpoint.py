"""Sampling that a crash or a cancel does not undo: the loop's state on disk, for the same video to go on from.

A checkpoint belongs to everything that decides the result: model, conditioning, sampler settings, precision. How the
work is cut up does not, so a plan may be another one when it goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import FileError
from ..files import atomic_file, file_errors, set_aside
from .state import LoopState, Remembered, Scalar

logger = logging.getLogger(__name__)

_VERSION, _HEADER, _LATENTS = 1, "i2v_checkpoint", "latents"
_SUFFIX, _KEPT_FILES = ".checkpoint.safetensors", 16

_WORTHWHILE_SECONDS = 120.0
_INTERVAL_SECONDS = 30.0


class CheckpointWhen(str, Enum):
    """When the state is written: every 30 s of runs that will take more than 2 minutes; or after every step."""

    AUTO = "auto"
    EVERY_STEP = "every step"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointing:
    """Where checkpoints are kept, and when they are written."""

    folder: Path
    when: CheckpointWhen = CheckpointWhen.AUTO


def checkpoint_key(parts: Mapping[str, str | int | float | bool | None], tensors: Mapping[str, Tensor]) -> str:
    """A name for exactly these settings and values."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def weights_identity(folder: Path, files: Sequence[Path] = ()) -> str:
    """What tells a model's weights from others without reading them: the place, size and time of each file in its
    folder, and of those outside.
    """
    inside = sorted(file for suffix in ("safetensors", "gguf") for file in folder.glob(f"**/*.{suffix}"))
    names = [*(str(file.relative_to(folder)) for file in inside), *(str(file.resolve()) for file in files)]
    stats = [file.stat() for file in (*inside, *files)]
    found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    return hashlib.sha256(repr((str(folder.resolve()), found)).encode()).hexdigest()[:16]


class CheckpointFile:
    """The checkpoint of one video. Whatever is wrong with the disk is said and does not stop the sampling."""

    def __init__(self, chosen: Checkpointing, key: str, total_steps: int) -> None:
        self.path = chosen.folder / f"{key}{_SUFFIX}"
        self._key, self._when, self._total_steps = key, chosen.when, total_steps
        self._began_seconds = self._written_seconds = time.monotonic()
        self._first_step = 0

    def load(self, like_BCTHW: Tensor) -> LoopState | None:
        """The state to go on from, None where there is none; a damaged or foreign file is set aside.

        `like_BCTHW` are latents of the shape that is expected.
        """
        if self._when is CheckpointWhen.OFF or not self.path.is_file():
            return None
        try:
            state = self._read(like_BCTHW)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            logger.warning("the checkpoint in %s cannot be used and is set aside: %s", self.path, error)
            set_aside(self.path)
            return None
        self.goes_on_from(state)
        return state

    def goes_on_from(self, state: LoopState) -> None:
        """What was done before the run began would not be missed a second time."""
        self._first_step = state.steps_done

    def is_due(self, steps_done: int) -> bool:
        """Whether the state after this step is worth writing."""
        if self._when is CheckpointWhen.EVERY_STEP:
            return self.is_worthwhile(steps_done)
        return self.is_worthwhile(steps_done) and time.monotonic() - self._written_seconds >= _INTERVAL_SECONDS

    def is_worthwhile(self, steps_done: int) -> bool:
        """Whether what has been done since the run began, or was taken up, would be missed."""
        if not self._first_step < steps_done < self._total_steps or self._when is CheckpointWhen.OFF:
            return False
        step_seconds = (time.monotonic() - self._began_seconds) / (steps_done - self._first_step)
        return self._when is CheckpointWhen.EVERY_STEP or step_seconds * self._total_steps > _WORTHWHILE_SECONDS

    def save(self, state: LoopState) -> str | None:
        """Writes the state, whole or not at all; what was wrong, in words, if it could not be written."""
        try:
            content = _to_bytes(self._key, state)
            with atomic_file(self.path) as temporary, file_errors(self.path):
                temporary.write_bytes(content)
        except FileError as error:
            logger.warning("%s", error)
            return str(error)
        self._written_seconds = time.monotonic()
        _prune(self.path.parent)
        return None

    def delete(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the checkpoint in %s cannot be removed: %s", self.path, error)

    def _read(self, like_BCTHW: Tensor) -> LoopState:
        content = self.path.read_bytes()
        opened: Any = safetensors.safe_open(self.path, framework="pt")
        with opened as file:
            metadata = cast("dict[str, str]", file.metadata() or {})
        header = cast("dict[str, Any]", json.loads(metadata[_HEADER]))
        if header["version"] != _VERSION or header["key"] != self._key:
            raise ValueError("it is of another video or version")
        tensors = safetensors.torch.load(content)
        state = LoopState(
            steps_done=int(header["steps_done"]),
            latents_BCTHW=tensors[_LATENTS],
            scheduler={name: _unpacked(value, tensors) for name, value in header["scheduler"].items()},
        )
        if not 0 < state.steps_done < self._total_steps:
            raise ValueError(f"it is of step {state.steps_done} of {self._total_steps}")
        if state.latents_BCTHW.shape != like_BCTHW.shape or not torch.isfinite(state.latents_BCTHW).all():
            raise ValueError("its latents are of another shape, or not finite")
        return state


def _to_bytes(key: str, state: LoopState) -> bytes:
    tensors = {_LATENTS: state.latents_BCTHW}
    scheduler = {name: _packed(name, value, tensors) for name, value in state.scheduler.items()}
    header = {"version": _VERSION, "key": key, "steps_done": state.steps_done, "scheduler": scheduler}
    # Some of a scheduler's tensors may be one and the same, which the format does not store.
    contents = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contents, {_HEADER: json.dumps(header)})


def _packed(name: str, value: Remembered, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value of a scheduler; its tensors are added to `tensors`, and named."""
    if isinstance(value, list):
        return [_packed(f"{name}.{index}", item, tensors) for index, item in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} of the scheduler is {value}")
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Remembered:
    if isinstance(value, list):
        return [cast("Scalar | Tensor", _unpacked(item, tensors)) for item in cast("list[Any]", value)]
    return tensors[value["tensor"]] if isinstance(value, dict) else value


def _prune(folder: Path) -> None:
    """Keeps the newest: a video that was given up would stay for ever."""
    try:
        files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[_KEPT_FILES:]:
            file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("old checkpoints in %s cannot be removed: %s", folder, error)
