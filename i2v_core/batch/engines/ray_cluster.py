"""A Ray cluster: reached, or started on this machine; and what a worker is to ask of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...errors import I2VError, MissingPackageError

LOCAL = "local"
"""In place of an address: a cluster of this machine alone, for as long as the batch takes."""
VRAM_RESOURCE = "vram_gib"
"""What a node may declare of its cards' memory in all; each worker then takes its card's part."""
_PACKAGE = Path(__file__).parents[1]


def import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "Ray is not installed", "install it with `pip install ray`, or leave --ray out"
        ) from error
    return ray


def connect(ray: Any, address: str, cpu_workers: int) -> None:
    """To the cluster at `address`, which gets this package's code; `LOCAL` starts one.

    Raises:
        I2VError: it cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    here: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(cpu_workers, 1)}
    where = here if address == LOCAL else {"address": address}
    try:
        ray.init(**where, runtime_env={"py_modules": [str(_PACKAGE)]}, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise I2VError(
            f"the Ray cluster at {address} cannot be reached ({error})",
            "start it, or check the address with `ray status`",
        ) from error


def placements(ray: Any, cpu_workers: int) -> list[dict[str, Any]]:
    """What to ask of Ray for each worker: a card with its memory, on its node; else a processor."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    placements: list[dict[str, Any]] = []
    for node in ray.nodes():
        resources: dict[str, float] = node["Resources"] if node["Alive"] else {}
        cards = int(resources.get("GPU", 0))
        for _ in range(cards):
            needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0}
            needs["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            if VRAM_RESOURCE in resources:
                needs["resources"] = {VRAM_RESOURCE: resources[VRAM_RESOURCE] / cards}
            placements.append(needs)
    return placements or [{"num_cpus": 1}] * cpu_workers
