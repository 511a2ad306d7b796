"""Settings of a batch engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...sampling.checkpoint import CheckpointWhen
from ..jobs.leases import LEASE_SECONDS
from ..scheduling.policy import Policy

MOST_CLIPS = 16
"""The largest `clips_at_once` that can be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of an engine, the same on this machine and on a cluster."""

    output: Path
    """Folder of the videos."""
    work: Path | None = None
    """Folder of checkpoints, kept latents and thumbnails; None: beside the queue's file."""
    policy: Policy = Policy.WEIGHT
    max_in_flight: int = 4
    """Jobs of a device between the queue and their file; 1 runs them one after another."""
    clips_at_once: int | None = None
    """At most so many matching jobs are sampled in one batch; None: as many as are predicted to pay."""
    attempts: int = 3
    """Runs of a job that may fail before it is set aside."""
    retry_seconds: float = 5.0
    """Wait before the first retry of a job; doubled for each further one."""
    memory_wait_seconds: float = 60.0
    """How long a stage waits for other programs before it is planned again for less memory."""
    checkpoints: CheckpointWhen = CheckpointWhen.AUTO
    waits_for_more: bool = False
    """The engine goes on when the queue is empty, until it is stopped."""
    renew_seconds: float = 1.0
    """Interval at which leases are renewed, stop requests are read, and an idle device looks for jobs."""
    lease_seconds: float = LEASE_SECONDS
    """How long an engine may be silent before its jobs go to others."""
