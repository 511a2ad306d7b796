"""Services that the host's side provides to fitted models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...i2v_core.memory.device import DeviceFacts
from ...i2v_core.sampling.checkpoint import Checkpointing
from .call_plan import UNKNOWN_DEVICE


def _no_learning(_model: str, _facts: DeviceFacts, _predicted_bytes: int, _measured_bytes: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Services that the host's side provides to a fit."""

    usable_bytes: Callable[[], int]
    """Device memory that the model may take now: the budget, or what is free or can be freed."""
    check_cancelled: Callable[[], None]
    """Raises when the user has cancelled."""
    say: Callable[[str], None] = lambda _: None
    """Shows a line to the user."""
    free_bytes: Callable[[], int | None] = lambda: None
    """Device memory that nobody holds; None where that is not known."""
    device_facts: Callable[[str], DeviceFacts] = lambda _: UNKNOWN_DEVICE
    """The device, with what earlier runs of a model took of their predictions."""
    learn: Callable[[str, DeviceFacts, int, int], None] = _no_learning
    """Keeps a model's predicted and measured peak in bytes for later runs."""
    keep_report: Callable[[Mapping[str, Any]], None] = lambda _: None
    """Takes the report of a run, as `run_report.StageFigures` reads it."""
    checkpointing: Checkpointing | None = None
    """Where and when a run's calls are recorded, to resume it; None: never."""
    is_whole: Callable[[str], bool] = lambda _: False
    """Whether a prompt, by the host's name of it, has been run to its end."""
    check_latent: Callable[[Sequence[int]], None] = lambda _: None
    """Called before sampling with the latent's shape; raises where what follows could not run, such as the decode."""
