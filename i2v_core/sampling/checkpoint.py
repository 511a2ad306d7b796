"""Checkpoints of the sampling loop on disk, from which the same video resumes after a crash or a cancel.

A checkpoint's key covers everything that decides the result: model, conditioning, sampler settings, precision. Chunking
and streaming do not change the result, so a run may resume under another plan.
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
from .state import LoopState, Scalar, SchedulerValue

logger = logging.getLogger(__name__)

_VERSION, _HEADER, _LATENTS = 1, "i2v_checkpoint", "latents"
_SUFFIX = ".checkpoint.safetensors"
_MAX_FILES = 16  # checkpoints of abandoned videos would fill the disk

_WORTHWHILE_SECONDS = 120.0  # shorter runs are cheap to repeat
_INTERVAL_SECONDS = 30.0  # at most this much work is lost


class CheckpointWhen(str, Enum):
    """Times at which checkpoints are written."""

    AUTO = "auto"
    """Every 30 s, in runs that take more than 2 minutes."""

    EVERY_STEP = "every step"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointing:
    """The folder of checkpoints, and when they are written."""

    folder: Path
    when: CheckpointWhen = CheckpointWhen.AUTO


def checkpoint_key(parts: Mapping[str, str | int | float | bool | None], tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of exactly these settings and values."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        content = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {content.dtype} {tuple(content.shape)}".encode())
        digest.update(content.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def weights_identity(folder: Path, files: Sequence[Path] = ()) -> str:
    """Identify a model's weights without reading them: hash path, size and time of the weight files.

    Args:
        folder: the model's folder, of which all weight files count.
        files: weight files outside of it.
    """
    inside = sorted(file for suffix in ("safetensors", "gguf") for file in folder.glob(f"**/*.{suffix}"))
    names = [*(str(file.relative_to(folder)) for file in inside), *(str(file.resolve()) for file in files)]
    stats = [file.stat() for file in (*inside, *files)]
    found = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    return hashlib.sha256(repr((str(folder.resolve()), found)).encode()).hexdigest()[:16]


class CheckpointFile:
    """The checkpoint of one video. Problems with the disk are logged or returned, and never stop the sampling."""

    def __init__(self, checkpointing: Checkpointing, key: str, total_steps: int) -> None:
        self.path = checkpointing.folder / f"{key}{_SUFFIX}"
        self._key, self._when, self._total_steps = key, checkpointing.when, total_steps
        self._began_seconds = self._written_seconds = time.monotonic()
        self._first_step = 0

    def load(self, like_BCTHW: Tensor) -> LoopState | None:
        """Return the state to resume from, or None. A damaged or foreign file is set aside.

        `like_BCTHW` has the expected shape of the latents.
        """
        if self._when is CheckpointWhen.OFF or not self.path.is_file():
            return None
        try:
            state = self._read(like_BCTHW)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            logger.warning("the checkpoint in %s cannot be used and is set aside: %s", self.path, error)
            set_aside(self.path)
            return None
        self.set_resumed_from(state)
        return state

    def set_resumed_from(self, state: LoopState) -> None:
        """Leave the steps up to `state` out of account: their time was not spent in this run."""
        self._first_step = state.steps_done

    def is_due(self, steps_done: int) -> bool:
        """Return whether to write the state after this step."""
        if self._when is CheckpointWhen.EVERY_STEP:
            return self.is_worthwhile(steps_done)
        return self.is_worthwhile(steps_done) and time.monotonic() - self._written_seconds >= _INTERVAL_SECONDS

    def is_worthwhile(self, steps_done: int) -> bool:
        """Return whether the steps since the run began or resumed are worth keeping."""
        if not self._first_step < steps_done < self._total_steps or self._when is CheckpointWhen.OFF:
            return False
        step_seconds = (time.monotonic() - self._began_seconds) / (steps_done - self._first_step)
        return self._when is CheckpointWhen.EVERY_STEP or step_seconds * self._total_steps > _WORTHWHILE_SECONDS

    def save(self, state: LoopState) -> str | None:
        """Write the state, whole or not at all; return the problem, in words, if it could not be written."""
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
            raise ValueError("it belongs to another video or version")
        tensors = safetensors.torch.load(content)
        state = LoopState(
            steps_done=int(header["steps_done"]),
            latents_BCTHW=tensors[_LATENTS],
            scheduler={name: _unpacked(value, tensors) for name, value in header["scheduler"].items()},
        )
        if not 0 < state.steps_done < self._total_steps:
            raise ValueError(f"its step is {state.steps_done} of {self._total_steps}")
        if state.latents_BCTHW.shape != like_BCTHW.shape or not torch.isfinite(state.latents_BCTHW).all():
            raise ValueError("its latents have another shape, or values that are not finite")
        return state


def _to_bytes(key: str, state: LoopState) -> bytes:
    tensors = {_LATENTS: state.latents_BCTHW}
    scheduler = {name: _packed(name, value, tensors) for name, value in state.scheduler.items()}
    header = {"version": _VERSION, "key": key, "steps_done": state.steps_done, "scheduler": scheduler}
    # Cloned, because two attributes of a scheduler may share one tensor, which safetensors refuses to store.
    contents = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contents, {_HEADER: json.dumps(header)})


def _packed(name: str, value: SchedulerValue, tensors: dict[str, Tensor]) -> Any:
    """Return a scheduler's value as JSON; its tensors are added to `tensors` and referred to by name."""
    if isinstance(value, list):
        return [_packed(f"{name}.{index}", item, tensors) for index, item in enumerate(value)]
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} of the scheduler is {value}")
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> SchedulerValue:
    if isinstance(value, list):
        return [cast("Scalar | Tensor", _unpacked(item, tensors)) for item in cast("list[Any]", value)]
    return tensors[value["tensor"]] if isinstance(value, dict) else value


def _prune(folder: Path) -> None:
    """Delete all but the newest checkpoints: those of abandoned videos would stay forever."""
    try:
        files = sorted(folder.glob(f"*{_SUFFIX}"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in files[_MAX_FILES:]:
            file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("old checkpoints in %s cannot be removed: %s", folder, error)
