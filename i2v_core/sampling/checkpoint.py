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
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .digest import tensor_bytes
from .record_file import Record, found_or_set_aside, read_record, save_record, surplus
from .state import LoopState, Scalar, SchedulerValue

logger = logging.getLogger(__name__)

_LATENTS = "latents"
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
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
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


class CheckpointTimer:
    """Times at which a run of known length is worth a checkpoint."""

    def __init__(self, when: CheckpointWhen, total_steps: int) -> None:
        self._when, self._total_steps = when, total_steps
        self.start()

    def start(self, first_step: int = 0) -> None:
        """Count from here. The time of steps up to `first_step` was not spent in this run."""
        self._began_seconds = self._written_seconds = time.monotonic()
        self._first_step = first_step

    def is_due(self, steps_done: int) -> bool:
        """Return whether to write what has been done."""
        if self._when is CheckpointWhen.EVERY_STEP:
            return self.is_worthwhile(steps_done)
        return self.is_worthwhile(steps_done) and time.monotonic() - self._written_seconds >= _INTERVAL_SECONDS

    def is_worthwhile(self, steps_done: int) -> bool:
        """Return whether the steps since the run began or resumed are worth keeping."""
        if steps_done <= self._first_step or self._when is CheckpointWhen.OFF:
            return False
        step_seconds = (time.monotonic() - self._began_seconds) / (steps_done - self._first_step)
        return self._when is CheckpointWhen.EVERY_STEP or step_seconds * self._total_steps > _WORTHWHILE_SECONDS

    def written(self) -> None:
        """Count the interval to the next checkpoint from here."""
        self._written_seconds = time.monotonic()


class CheckpointFile:
    """The checkpoint of one video. Problems with the disk are logged or returned, and never stop the sampling."""

    def __init__(self, checkpointing: Checkpointing, key: str, total_steps: int) -> None:
        self.path = checkpointing.folder / f"{key}{_SUFFIX}"
        self._key, self._when, self._total_steps = key, checkpointing.when, total_steps
        self._timer = CheckpointTimer(checkpointing.when, total_steps)

    def load(self, like_BCTHW: Tensor) -> LoopState | None:
        """Return the state to resume from, or None. A damaged or foreign file is set aside.

        `like_BCTHW` has the expected shape of the latents.
        """
        if self._when is CheckpointWhen.OFF:
            return None
        state = found_or_set_aside(self.path, partial(self._read, like_BCTHW))
        if state is not None:
            self.set_resumed_from(state)
        return state

    def set_resumed_from(self, state: LoopState) -> None:
        """Leave the steps up to `state` out of account: their time was not spent in this run."""
        self._timer.start(state.steps_done)

    def is_due(self, steps_done: int) -> bool:
        """Return whether to write the state after this step."""
        return steps_done < self._total_steps and self._timer.is_due(steps_done)

    def is_worthwhile(self, steps_done: int) -> bool:
        """Return whether the steps since the run began or resumed are worth keeping."""
        return steps_done < self._total_steps and self._timer.is_worthwhile(steps_done)

    def save(self, state: LoopState) -> str | None:
        """Write the state, whole or not at all; return the problem, in words, if it could not be written."""
        problem = save_record(self.path, self._key, _to_record(state))
        if problem is None:
            self._timer.written()
            _prune(self.path.parent)
        return problem

    def delete(self) -> None:
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the checkpoint in %s cannot be removed: %s", self.path, error)

    def _read(self, like_BCTHW: Tensor) -> LoopState:
        record = read_record(self.path, self._key)
        state = LoopState(
            steps_done=int(record.facts["steps_done"]),
            latents_BCTHW=record.tensors[_LATENTS],
            scheduler={name: _unpacked(value, record.tensors) for name, value in record.facts["scheduler"].items()},
        )
        if not 0 < state.steps_done < self._total_steps:
            raise ValueError(f"its step is {state.steps_done} of {self._total_steps}")
        if state.latents_BCTHW.shape != like_BCTHW.shape or not torch.isfinite(state.latents_BCTHW).all():
            raise ValueError("its latents have another shape, or values that are not finite")
        return state


def _to_record(state: LoopState) -> Record:
    tensors = {_LATENTS: state.latents_BCTHW}
    scheduler = {name: _packed(name, value, tensors) for name, value in state.scheduler.items()}
    return Record(tensors, {"steps_done": state.steps_done, "scheduler": scheduler})


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
        for file in surplus(list(folder.glob(f"*{_SUFFIX}")), most=_MAX_FILES):
            file.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("old checkpoints in %s cannot be removed: %s", folder, error)
