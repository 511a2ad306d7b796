"""A Ray cluster: connecting to it or starting one on this machine, and the resources of each worker."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import I2VError, MissingPackageError

LOCAL = "local"
"""Address of a cluster on this machine alone, which lasts as long as the batch."""
VRAM_RESOURCE = "vram_gib"
"""Custom resource in which a node may declare the memory of all its cards; each worker reserves its card's part."""
_PACKAGE = Path(__file__).parents[2]


def import_ray() -> Any:
    """The `ray` module, with the parts that the driver uses.

    Raises:
        MissingPackageError: Ray is not installed.
    """
    try:
        ray = import_module("ray")
        import_module("ray.util.scheduling_strategies")
    except ImportError as error:
        raise MissingPackageError(
            "Ray is not installed", "install it with `pip install ray`, or leave --ray out"
        ) from error
    return ray


def connect(ray: Any, address: str, cpu_workers: int) -> None:
    """Connects to the cluster at `address`, and sends it this package's code. `LOCAL` starts a cluster.

    Raises:
        I2VError: it cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(cpu_workers, 1)}
    where = local if address == LOCAL else {"address": address}
    try:
        ray.init(**where, runtime_env={"py_modules": [str(_PACKAGE)]}, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise I2VError(
            f"the Ray cluster at {address} cannot be reached ({error})",
            "start it, or check the address with `ray status`",
        ) from error


def worker_resources(ray: Any, cpu_workers: int) -> list[dict[str, Any]]:
    """Actor options of each worker: one for each card, on its node. A cluster without cards gets `cpu_workers`."""
    options: list[dict[str, Any]] = []
    for node in ray.nodes():
        resources: dict[str, float] = node["Resources"] if node["Alive"] else {}
        cards = int(resources.get("GPU", 0))
        for _ in range(cards):
            on_node = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0, "scheduling_strategy": on_node}
            if VRAM_RESOURCE in resources:
                needs["resources"] = {VRAM_RESOURCE: resources[VRAM_RESOURCE] / cards}
            options.append(needs)
    return options or [{"num_cpus": 1}] * cpu_workers
