"""Live plan on the VRAM Budget node: whether it fits, the memory of each stage, and suggestions if it does not fit."""

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
"""Widgets of I2V Loader, besides the model, that the plan depends on."""


def live_plan(values: Mapping[str, Any], *, with_fixes: bool) -> JSON:
    """Return the answer for the page, from the values of the widgets of VRAM Budget and I2V Loader.

    `fixes` lists settings that would fit, each as a label and the widgets to change; None without `with_fixes`, since
    the search takes seconds.

    Raises:
        I2VError: no plan can be made for the model or for one of the values.
    """
    folder = host.model_folder(values["model"])
    files = host_files.chosen_files(*(values.get(name, host_files.FROM_FOLDER) for name in LOADER_FILES))
    budget_values = {name: value for name, value in values.items() if name not in ("model", *LOADER_FILES)}
    inputs = planner_inputs(_architecture(folder, tuple(files.items()), _stamp(folder, files)), **budget_values)
    plan = find_plan(inputs.request, inputs.budget, inputs.device)
    if plan is not None:
        texts = {"verdict": _fit_verdict(plan), "ways": _run_modes(plan), "given_up": _approximations(plan)}
        return _answer(inputs, plan.predictions, fits=True, **texts, fixes=[])
    stages = lowest_memory_stages(inputs.request, inputs.device, inputs.budget.host_free_bytes)
    return _answer(
        inputs,
        stages,
        fits=False,
        verdict=_misfit_verdict(inputs, stages),
        ways=[],
        given_up=[],
        fixes=_fixes(inputs) if with_fixes else None,
    )


def _stamp(folder: Path, files: WeightFiles) -> tuple[tuple[str, int, int], ...]:
    """Return a key that changes when a config, or a weight file whose header is read, changes."""
    read = [folder / "model_index.json", *sorted(folder.glob("*/*.json")), *folder.glob("*/*.gguf"), *files.values()]
    facts = [(str(file), file.stat()) for file in read if file.is_file()]
    return tuple((name, it.st_mtime_ns, it.st_size) for name, it in facts)


@lru_cache(maxsize=8)
def _architecture(folder: Path, files: tuple[tuple[str, Path], ...], stamp: object) -> Architecture:  # noqa: ARG001
    return read_architecture(folder, dict(files))


def _answer(inputs: PlannerInputs, stages: Iterable[StagePrediction], **texts: Any) -> JSON:
    return {
        **texts,
        "device": inputs.device.name,
        "usable_bytes": inputs.budget.usable_bytes,
        "binding_stage": _binding(stages).stage.value,
        "stages": [
            {
                "stage": it.stage.value,
                "weights_bytes": it.weights_bytes,
                "activation_bytes": it.activation_bytes,
                "peak_bytes": it.peak_bytes,
                "needed_bytes": needed_bytes(it, inputs.device),
            }
            for it in stages
        ],
    }


def _binding(stages: Iterable[StagePrediction]) -> StagePrediction:
    return max(stages, key=lambda it: it.peak_bytes)


def _fit_verdict(plan: Plan) -> str:
    needed = needed_bytes(plan.binding_stage, plan.device)
    return f"Fits: {format_gib(needed)} of {format_gib(plan.budget.usable_bytes)} on {plan.device.name}"


def _misfit_verdict(inputs: PlannerInputs, stages: Iterable[StagePrediction]) -> str:
    least = _binding(stages)
    return (
        f"Does not fit: {least.stage.value} needs at least {format_gib(needed_bytes(least, inputs.device))}, "
        f"{format_gib(inputs.budget.usable_bytes)} available on {inputs.device.name}"
    )


def _run_modes(plan: Plan) -> list[str]:
    """Return how the denoiser runs, as keys of the page's texts."""
    modes = [plan.precision, "whole" if plan.sample.settings.workspace_bytes is None else "pieces"]
    return [*modes, "streamed"] if plan.sample.settings.streamed else modes


def _approximations(plan: Plan) -> list[JSON]:
    """Return what makes the result approximate, as messages for the page."""
    approximation, found = Approximation.of(plan.sample.settings), list[Message]()
    formats = [*plan.request.architecture.stored_formats]
    if approximation.weight_storage is not WeightStorage.AS_COMPUTED:
        formats.append(approximation.weight_storage.value)
    if formats:
        found.append(message("approximateWeights", formats=", ".join(formats)))
    if approximation.context is not None:
        found.append(message("approximateWindows", frames=approximation.context.context_length))
    return [it.as_dict() for it in found]


def _fixes(inputs: PlannerInputs) -> list[JSON]:
    try:
        make_plan(inputs.request, inputs.budget, inputs.device)
    except NothingFitsError as refusal:
        suggestions = refusal.suggestions
    else:
        return []
    fixes = [*_size_fixes(suggestions), *_other_fixes(inputs, suggestions)]
    return [{"label": label, "changes": changes} for label, changes in fixes]


def _size_fixes(suggestions: Suggestions) -> Iterable[tuple[str, JSON]]:
    if suggestions.shorter:
        frames = suggestions.shorter.frames
        yield f"{frames} frame{'s' if frames > 1 else ''}", {"frames": frames}
    if suggestions.smaller:
        width, height = suggestions.smaller.width_pixels, suggestions.smaller.height_pixels
        yield f"{width}×{height}", {"width": width, "height": height}


def _other_fixes(inputs: PlannerInputs, suggestions: Suggestions) -> Iterable[tuple[str, JSON]]:
    if suggestions.approximation:
        yield f"allow {suggestions.approximation}", {"allow_approximate": True}
    automatic = replace(inputs.request, precision=AUTO)
    if automatic != inputs.request and fits(automatic, inputs.device, FitLimit.of(inputs.budget, inputs.device)):
        yield "automatic precision", {"precision": AUTO}
    # Suggest a larger budget only if that much is free.
    if suggestions.budget_bytes <= inputs.budget.free_bytes and inputs.budget.usable_bytes < suggestions.budget_bytes:
        amount = _rounded_up(suggestions.budget_bytes)
        yield f"a budget of {amount}", {"budget": amount}


def _rounded_up(size_bytes: int) -> str:
    """Format an amount for the budget widget, rounded up so that it is enough."""
    if size_bytes < GIB:
        return f"{-(-size_bytes // MIB)} MiB"
    return f"{-(-size_bytes * 100 // GIB) / 100:.2f} GiB"
