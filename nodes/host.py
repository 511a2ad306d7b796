"""Adapter to ComfyUI: device, memory, folders, interrupt. Files are in `host_files`, progress in `host_progress`."""

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
from server import PromptServer
from torch import Tensor

from ..i2v_core.errors import ModelFolderError
from ..i2v_core.families import Architecture, I2VModel
from ..i2v_core.memory.calibration import CalibrationStore, calibration_key
from ..i2v_core.memory.device import DeviceFacts, device_facts
from ..i2v_core.memory.leaks import live_tensors_logged
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
    """Return the demo model and every diffusers-format folder below the host's `diffusers` model folders, by name."""
    found = {DEMO_MODEL: _DEMO_FOLDER}
    for root in folder_paths.get_folder_paths("diffusers"):
        for index in ("model_index.json", "unet/config.json"):
            for file in sorted(Path(root).glob(f"*/{index}")):
                folder = Path(root) / file.relative_to(root).parts[0]
                found.setdefault(folder.name, folder)
    return found


def model_folder(name: object) -> Path:
    """Return the folder of a name in `model_folders`; raise `ModelFolderError` for any other."""
    folders = model_folders()
    if not isinstance(name, str) or name not in folders:
        raise ModelFolderError(f"there is no model folder '{name}'", "choose one from the list in I2V Loader")
    return folders[name]


def plan_device(architecture: Architecture, device: torch.device | None = None) -> DeviceFacts:
    """Describe the host's device, or another, for the planner.

    Precisions follow the host's flags and what it knows of the card; the calibration comes from earlier runs of the
    model on that device.
    """
    device = device or management.get_torch_device()
    facts = calibrated_device(architecture.fingerprint, device)
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


def calibrated_device(model: str, device: torch.device) -> DeviceFacts:
    """Describe a device, with what earlier runs of a model on it took of their predictions."""
    facts = device_facts(device)
    return replace(facts, calibration=calibration_store().calibration(calibration_key(facts.name, model)))


def reserve_bytes() -> int:
    """Return the bytes that the host keeps free for other programs (`--reserve-vram`); 0 on the CPU."""
    if management.get_torch_device().type == "cpu":
        return 0
    return int(management.extra_reserved_memory())


def reclaimable_bytes() -> int:
    """Return the free device memory plus what the host can free by unloading its own models."""
    device = management.get_torch_device()
    loaded = [model for model in management.current_loaded_models if model.device == device]
    unloadable_bytes = 0 if device.type == "cpu" else sum(model.model_loaded_memory() for model in loaded)
    return int(management.get_free_memory(device) + unloadable_bytes)


def unheld_bytes() -> int | None:
    """Return the device memory that no process holds, our allocator included; None where that is not known."""
    device = management.get_torch_device()
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def attention_backend() -> AttentionBackend:
    """Return the host's choice: SageAttention or xformers if it uses that itself, else PyTorch's own."""
    if management.sage_attention_enabled():
        return AttentionBackend.SAGE
    use_xformers = management.xformers_enabled() and not management.pytorch_attention_enabled()
    return AttentionBackend.XFORMERS if use_xformers else AttentionBackend.SDPA


def host_free_bytes() -> int | None:
    """Return the free host memory; None on the CPU, where host memory is the device memory."""
    return None if management.get_torch_device().type == "cpu" else ram_free_bytes()


def ram_free_bytes() -> int:
    """Return the free RAM of this machine, whatever the device is."""
    return int(management.get_free_memory(torch.device("cpu")))


@contextmanager
def stage(
    name: Stage, model: I2VModel, plan: Plan, preview_factors: Tensor | None = None
) -> Generator[tuple[Plan, Runtime, list[str]]]:
    """Make room on the device for a stage; yield a plan that fits what is free now, the runtime, and user notes.

    Notes say, for example, that the plan had to be made again. While the stage runs, the node shows its progress; with
    `preview_factors`, the progress bar also shows a preview of all frames. Caches are emptied at the end.
    """
    plan.check_made_for(model.architecture)
    local = _for_this_machine(plan)
    notes: list[str] = []
    if local is not plan:
        notes.append(
            f"planned for {plan.device.name}: planned again for {local.device.name}, within that card's memory"
        )
        plan = local
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
        with live_tensors_logged(name.value) if _DEBUG_MEMORY else nullcontext():
            yield fitting, runtime, notes
    finally:
        management.soft_empty_cache()


def unload_everything() -> torch.device:
    """Unload the host's own models from its device, and return the device."""
    device = management.get_torch_device()
    _unload_everything(device)
    return device


def _for_this_machine(plan: Plan) -> Plan:
    """Make a plan for another card again for this machine, within that card's memory; return others unchanged."""
    local_device = plan_device(plan.request.architecture)
    if plan.device.name == local_device.name:
        return plan
    budget = replace(
        plan.budget,
        free_bytes=min(plan.budget.free_bytes, reclaimable_bytes() - reserve_bytes()),
        host_free_bytes=host_free_bytes(),
    )
    return make_plan(plan.request, budget, local_device)


def _unload_everything(device: torch.device) -> None:
    """Unload all of the host's own models from `device`."""
    management.free_memory(sys.maxsize, device)
    management.soft_empty_cache()


def finish_stage(report: StageReport, notes: list[str]) -> dict[str, list[Any]]:
    """Record prediction and measurement for later plans; return what the node shows: figures for scripts, and text."""
    plan = report.plan
    # A failed attempt says something about the prediction only if it had already taken more than predicted.
    exceeded = [(predicted, measured) for predicted, measured in report.failed if measured > predicted]
    for predicted, measured in (*exceeded, (plan.prediction(report.stage).peak_bytes, report.measured_peak_bytes)):
        calibration_store().record(
            calibration_key(plan.device.name, plan.request.architecture.fingerprint),
            report.stage.value,
            predicted_bytes=predicted,
            measured_bytes=measured,
        )
    return {
        "i2v_stage": [{**report.as_dict(), "notes": [*notes, *report.notes]}],
        "text": ["\n".join([str(report), *notes, *report.notes])],
    }


def checkpoint_folder() -> Path:
    return _own_folder() / "checkpoints"


def has_succeeded(prompt_id: str) -> bool:
    """Return whether the host has run a prompt to its end, as far as it remembers."""
    queue = PromptServer.instance.prompt_queue
    found = queue.get_history(prompt_id, map_function=lambda item: item["status"] or {})
    return any(status.get("completed") for status in found.values())


def queue_file() -> Path:
    return _own_folder() / "jobs.queue"


def pictures_folder() -> Path:
    """Return the folder for images from the graph that queued jobs start from."""
    return _own_folder() / "pictures"


def calibration_store() -> CalibrationStore:
    return CalibrationStore(_own_folder() / "calibration.json")


def _own_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "i2v_budget"
