"""Reports of the runs that VRAM Fit has fitted: core's samplers, unlike the pack's own, cannot pass them on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_execution.utils import get_executing_context

_KEPT_PROMPTS = 8

_runs: dict[str, list[Mapping[str, Any]]] = {}
"""By prompt, the latest last."""


def keep(report: Mapping[str, Any]) -> None:
    """Keep the report of a run that ends now, in the prompt that runs."""
    prompt = _running_prompt()
    _runs[prompt] = [*_runs.pop(prompt, []), report]
    for old in list(_runs)[:-_KEPT_PROMPTS]:
        del _runs[old]


def of(latent: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """Return the reports of the prompt that made a latent: the one that runs, or else the last with one of its shape,
    whose samplers were cached since.
    """
    if latent is None:
        return ()
    shape = list(latent["samples"].shape)
    made = next((runs for runs in reversed(_runs.values()) if runs[-1]["latent_shape"] == shape), [])
    return tuple(_runs.get(_running_prompt(), made))


def _running_prompt() -> str:
    context = get_executing_context()
    return "" if context is None else context.prompt_id
