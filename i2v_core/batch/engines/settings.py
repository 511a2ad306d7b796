"""What an engine is told, and what it tells of its devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...sampling.checkpoint import CheckpointWhen
from ..jobs.leases import LEASE_SECONDS
from ..scheduling.policy import Policy

MOST_CLIPS = 16
"""At once, that can be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of an engine.

    `max_in_flight`: jobs of a device between the queue and their file; 1 runs them one after another. `attempts`: runs
    of a job that may fail. `clips_at_once`: jobs of one shape that are sampled together at most; None: where that is
    predicted to pay. `memory_wait_seconds`: how long a stage waits for other programs before it is planned again for
    less. `work` is the folder of what jobs go on from; None: beside the queue's file. `waits_for_more`: the engine goes
    on when the queue is empty, until it is stopped.
    """

    output: Path
    work: Path | None = None
    policy: Policy = Policy.WEIGHT
    max_in_flight: int = 4
    clips_at_once: int | None = None
    attempts: int = 3
    retry_seconds: float = 5.0
    memory_wait_seconds: float = 60.0
    checkpoints: CheckpointWhen = CheckpointWhen.AUTO
    waits_for_more: bool = False
    renew_seconds: float = 1.0
    lease_seconds: float = LEASE_SECONDS
