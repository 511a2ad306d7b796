"""The one adapter to ComfyUI: device, memory, folders, interrupt. Its parts are in `host_files` and `host_progress`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from comfy.cli_args import args
from torch import Tensor

from ..i2v_core.errors import ModelFolderError
from ..i2v_core.families import Architecture, I2VModel
from ..i2v_core.memory.calibration import CalibrationStore, calibration_key
from ..i2v_core.memory.device import DeviceFacts, device_facts
from ..i2v_core.memory.leaks import survivors_logged
from ..i2v_core.placement.attention import AttentionBackend
from ..i2v_core.planning.adjust import refit
from ..i2v_core.planning.margin import needed_bytes
from ..i2v_core.planning.plan import Plan, Stage
from ..i2v_core.planning.planner import make_plan
from ..i2v_core.stages import Runtime, StageReport
from ..i2v_core.units import format_gib
from .host_progress import Progress, wants_tiny_previews
from .tiny_decoder import find_tiny_decoder

logger = logging.getLogger(__name__)

DEMO_MODEL = "demo (bundled)"
_DEBUG_MEMORY = os.environ.get("I2V_DEBUG_MEMORY", "0") != "0"
_DEMO_FOLDER = Path(__file__).parent.parent / "assets" / "demo_model"


def model_folders() -> dict[str, Path]:
    """The demo model and every folder in diffusers layout below the host's `diffusers` model folders, by name."""
    found = {DEMO_MODEL: _DEMO_FOLDER}
    for root in folder_paths.get_folder_paths("diffusers"):
        for index in ("model_index.json", "unet/config.json"):
            for file in sorted(Path(root).glob(f"*/{index}")):
                folder = Path(root) / file.relative_to(root).parts[0]
                found.setdefault(folder.name, folder)
    return found


def model_folder(name: object) -> Path:
    """The folder of a name in `model_folders`; raises `ModelFolderError` for any other."""
    folders = model_folders()
    if not isinstance(name, str) or name not in folders:
        raise ModelFolderError(f"there is no model folder '{name}'", "choose one from the list in I2V Loader")
    return folders[name]


def plan_device(architecture: Architecture, device: torch.device | None = None) -> DeviceFacts:
    """The host's device, or another, with the precisions that the host's flags and its knowledge of the card leave, and
    with what earlier runs of the model on it have taught.
    """
    device = device or management.get_torch_device()
    facts = device_facts(device)
    learned = calibration_store().calibration(calibration_key(facts.name, architecture.fingerprint))
    facts = replace(facts, calibration=learned)
    forced = {
        torch.float32: args.force_fp32 or args.fp32_unet,
        torch.float16: args.force_fp16 or args.fp16_unet,
        torch.bfloat16: args.bf16_unet,
    }
    if any(forced.values()):
        return replace(facts, precisions=tuple(dtype for dtype, wanted in forced.items() if wanted))
    if device.type == "cpu":
        return facts
    usable = {
        torch.bfloat16: management.should_use_bf16(device),
        torch.float16: management.should_use_fp16(device),
        torch.float32: True,
    }
    return replace(facts, precisions=tuple(dtype for dtype, good in usable.items() if good))


def reserve_bytes() -> int:
    """What the host keeps free for other programs (`--reserve-vram`); nothing on the CPU."""
    if management.get_torch_device().type == "cpu":
        return 0
    return int(management.extra_reserved_memory())


def room_bytes() -> int:
    """Free device memory, and what the host can free by unloading its own models."""
    device = management.get_torch_device()
    loaded = [model for model in management.current_loaded_models if model.device == device]
    unloadable_bytes = 0 if device.type == "cpu" else sum(model.model_loaded_memory() for model in loaded)
    return int(management.get_free_memory(device) + unloadable_bytes)


def attention_backend() -> AttentionBackend:
    """The host's choice: SageAttention or xformers where it would use that itself, else PyTorch's own."""
    if management.sage_attention_enabled():
        return AttentionBackend.SAGE
    use_xformers = management.xformers_enabled() and not management.pytorch_attention_enabled()
    return AttentionBackend.XFORMERS if use_xformers else AttentionBackend.SDPA


def host_free_bytes() -> int | None:
    """Free host memory; None on the CPU, where it is the device's own."""
    return None if management.get_torch_device().type == "cpu" else spare_bytes()


def spare_bytes() -> int:
    """Free memory of this machine, beside that of a graphics card."""
    return int(management.get_free_memory(torch.device("cpu")))


@contextmanager
def stage(
    name: Stage, model: I2VModel, plan: Plan, preview_factors: Tensor | None = None
) -> Generator[tuple[Plan, Runtime, list[str]]]:
    """Room on the device, a plan that fits what is free now, and the runtime; what is left over is freed at the end.

    The list holds notes for the user, such as that the plan had to be made again. While it runs the node says how far
    it is; with `preview_factors` the progress bar shows all frames as they take shape.
    """
    plan.check_made_for(model.architecture)
    here = _for_this_machine(plan)
    notes: list[str] = []
    if here is not plan:
        notes.append(f"planned for {plan.device.name}: planned again for {here.device.name}, within that card's memory")
        plan = here
    device = plan.device.torch_device
    management.free_memory(needed_bytes(plan.prediction(name), plan.device) + plan.budget.reserve_bytes, device)
    # What is free in fact: the host may have been unable to unload as much as it was asked to.
    fitting = refit(plan, name, replace(plan.budget, free_bytes=int(management.get_free_memory(device))))
    if fitting is not plan:
        notes.append(
            f"less memory is free than when the plan was made ({format_gib(fitting.budget.free_bytes)}): "
            "planned again for " + name.value
        )
        logger.warning("%s", notes[-1])
    wants_tiny = preview_factors is not None and wants_tiny_previews()
    tiny = find_tiny_decoder(model.architecture, device) if wants_tiny else None
    progress = Progress(preview_factors, tiny, notes)
    runtime = Runtime(
        device=device,
        attention=attention_backend(),
        check_cancelled=management.throw_exception_if_processing_interrupted,
        on_progress=progress.update,
        on_status=progress.show,
        on_frames=progress.add_frames,
        make_room=lambda: _unload_everything(device),
        free_bytes=lambda: int(management.get_free_memory(device)),
    )
    try:
        with survivors_logged(name.value) if _DEBUG_MEMORY else nullcontext():
            yield fitting, runtime, notes
    finally:
        management.soft_empty_cache()


def unload_everything() -> torch.device:
    """Frees the host's device of the host's own models, and returns it."""
    device = management.get_torch_device()
    _unload_everything(device)
    return device


def _for_this_machine(plan: Plan) -> Plan:
    """A plan for another card made again for what is here, within that card's memory; others as they are."""
    here = plan_device(plan.request.architecture)
    if plan.device.name == here.name:
        return plan
    budget = replace(
        plan.budget,
        free_bytes=min(plan.budget.free_bytes, room_bytes() - reserve_bytes()),
        host_free_bytes=host_free_bytes(),
    )
    return make_plan(plan.request, budget, here)


def _unload_everything(device: torch.device) -> None:
    """The host's own models, whatever it may need them for next."""
    management.free_memory(sys.maxsize, device)
    management.soft_empty_cache()


def concluded(report: StageReport, notes: list[str]) -> dict[str, list[Any]]:
    """Remembers how far off the prediction was, for later plans; and what a stage node shows: the numbers for scripts,
    the line for people.
    """
    plan = report.plan
    # Of attempts that ran out of memory only those teach that had taken more than was predicted.
    lessons = [(predicted, taken) for predicted, taken in report.failed if taken > predicted]
    for predicted, taken in (*lessons, (plan.prediction(report.stage).peak_bytes, report.measured_peak_bytes)):
        calibration_store().record(
            calibration_key(plan.device.name, plan.request.architecture.fingerprint),
            report.stage.value,
            predicted_bytes=predicted,
            measured_bytes=taken,
        )
    return {
        "i2v_stage": [{**report.as_dict(), "notes": [*notes, *report.notes]}],
        "text": ["\n".join([str(report), *notes, *report.notes])],
    }


def checkpoint_folder() -> Path:
    return _own_folder() / "checkpoints"


def queue_file() -> Path:
    return _own_folder() / "jobs.queue"


def pictures_folder() -> Path:
    """Where pictures from the graph are kept for jobs that wait."""
    return _own_folder() / "pictures"


def calibration_store() -> CalibrationStore:
    return CalibrationStore(_own_folder() / "calibration.json")


def _own_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "i2v_budget"
