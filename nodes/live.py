"""What VRAM Budget shows on the page before anything runs: whether it fits, what each stage takes, what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..i2v_core.families import Architecture, WeightFiles, read_architecture
from ..i2v_core.placement.precision import AUTO
from ..i2v_core.placement.storage import WeightStorage
from ..i2v_core.planning.approximations import Approximation
from ..i2v_core.planning.fit_limit import FitLimit
from ..i2v_core.planning.margin import needed_bytes
from ..i2v_core.planning.plan import Plan, StagePrediction
from ..i2v_core.planning.planner import find_plan, make_plan
from ..i2v_core.planning.search import fits, lowest_memory_stages
from ..i2v_core.planning.suggestions import NothingFitsError, Suggestions
from ..i2v_core.units import GIB, MIB, format_gib
from ..i2v_core.words import Message, message
from . import host, host_files
from .planner_inputs import PlannerInputs, planner_inputs

JSON = dict[str, Any]

LOADER_FILES = ("transformer_file", "low_noise_file")
"""The widgets of I2V Loader, beside the model's name, that say what a plan is made for."""


def live_plan(values: Mapping[str, Any], *, with_fixes: bool) -> JSON:
    """The answer for the page, from the values of VRAM Budget's widgets, and of I2V Loader's.

    `fixes` is what would fit instead, each as a label and the widgets to change; None where it is not looked for,
    which takes seconds.

    Raises:
        I2VError: the model, or a value, that no plan can be made for.
    """
    folder = host.model_folder(values["model"])
    files = host_files.chosen_files(*(values.get(name, host_files.FROM_FOLDER) for name in LOADER_FILES))
    of_budget = {name: value for name, value in values.items() if name not in ("model", *LOADER_FILES)}
    asked = planner_inputs(_architecture(folder, tuple(files.items()), _stamp(folder, files)), **of_budget)
    plan = find_plan(asked.request, asked.budget, asked.device)
    if plan is not None:
        said = {"verdict": _fitting(plan), "ways": _ways(plan), "given_up": _given_up(plan)}
        return _shown(asked, plan.predictions, fits=True, **said, fixes=[])
    stages = lowest_memory_stages(asked.request, asked.device, asked.budget.host_free_bytes)
    return _shown(
        asked,
        stages,
        fits=False,
        verdict=_refusing(asked, stages),
        ways=[],
        given_up=[],
        fixes=_fixes(asked) if with_fixes else None,
    )


def _stamp(folder: Path, files: WeightFiles) -> tuple[tuple[str, int, int], ...]:
    """Changes when a config does, or a file of weights whose header is read."""
    read = [folder / "model_index.json", *sorted(folder.glob("*/*.json")), *folder.glob("*/*.gguf"), *files.values()]
    facts = [(str(file), file.stat()) for file in read if file.is_file()]
    return tuple((name, it.st_mtime_ns, it.st_size) for name, it in facts)


@lru_cache(maxsize=8)
def _architecture(folder: Path, files: tuple[tuple[str, Path], ...], stamp: object) -> Architecture:  # noqa: ARG001
    return read_architecture(folder, dict(files))


def _shown(asked: PlannerInputs, stages: Iterable[StagePrediction], **answer: Any) -> JSON:
    return {
        **answer,
        "device": asked.device.name,
        "usable_bytes": asked.budget.usable_bytes,
        "binding_stage": _binding(stages).stage.value,
        "stages": [
            {
                "stage": it.stage.value,
                "weights_bytes": it.weights_bytes,
                "activation_bytes": it.activation_bytes,
                "peak_bytes": it.peak_bytes,
                "needed_bytes": needed_bytes(it, asked.device),
            }
            for it in stages
        ],
    }


def _binding(stages: Iterable[StagePrediction]) -> StagePrediction:
    return max(stages, key=lambda it: it.peak_bytes)


def _fitting(plan: Plan) -> str:
    needed = needed_bytes(plan.binding_stage, plan.device)
    return f"Fits: {format_gib(needed)} of {format_gib(plan.budget.usable_bytes)} on {plan.device.name}"


def _refusing(asked: PlannerInputs, stages: Iterable[StagePrediction]) -> str:
    least = _binding(stages)
    return (
        f"Does not fit: {least.stage.value} needs {format_gib(needed_bytes(least, asked.device))} at least, and "
        f"{format_gib(asked.budget.usable_bytes)} can be used on {asked.device.name}"
    )


def _ways(plan: Plan) -> list[str]:
    """How the denoiser runs, as names that the page has texts for."""
    ways = [plan.precision, "whole" if plan.sample.settings.workspace_bytes is None else "pieces"]
    return [*ways, "streamed"] if plan.sample.settings.streamed else ways


def _given_up(plan: Plan) -> list[JSON]:
    """What is approximate, in words."""
    approximation, found = Approximation.of(plan.sample.settings), list[Message]()
    formats = [*plan.request.architecture.stored_formats]
    if approximation.weight_storage is not WeightStorage.AS_COMPUTED:
        formats.append(approximation.weight_storage.value)
    if formats:
        found.append(message("approximateWeights", formats=", ".join(formats)))
    if approximation.context is not None:
        found.append(message("approximateWindows", frames=approximation.context.context_length))
    return [it.as_dict() for it in found]


def _fixes(asked: PlannerInputs) -> list[JSON]:
    try:
        make_plan(asked.request, asked.budget, asked.device)
    except NothingFitsError as refusal:
        near = refusal.suggestions
    else:
        return []
    ways = [*_size_fixes(near), *_other_fixes(asked, near)]
    return [{"label": label, "changes": changes} for label, changes in ways]


def _size_fixes(near: Suggestions) -> Iterable[tuple[str, JSON]]:
    if near.shorter:
        frames = near.shorter.frames
        yield f"{frames} frame{'s' if frames > 1 else ''}", {"frames": frames}
    if near.smaller:
        width, height = near.smaller.width_pixels, near.smaller.height_pixels
        yield f"{width}×{height}", {"width": width, "height": height}


def _other_fixes(asked: PlannerInputs, near: Suggestions) -> Iterable[tuple[str, JSON]]:
    if near.approximation:
        yield f"allow {near.approximation}", {"allow_approximate": True}
    automatic = replace(asked.request, precision=AUTO)
    if automatic != asked.request and fits(automatic, asked.device, FitLimit.of(asked.budget, asked.device)):
        yield "automatic precision", {"precision": AUTO}
    # More than is free cannot be had.
    if near.budget_bytes <= asked.budget.free_bytes and asked.budget.usable_bytes < near.budget_bytes:
        amount = _rounded_up(near.budget_bytes)
        yield f"a budget of {amount}", {"budget": amount}


def _rounded_up(size_bytes: int) -> str:
    """As people write it, and not less."""
    if size_bytes < GIB:
        return f"{-(-size_bytes // MIB)} MiB"
    return f"{-(-size_bytes * 100 // GIB) / 100:.2f} GiB"
