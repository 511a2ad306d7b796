"""VRAM Fit: runs a model of core's loaders within a budget of device memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management as management
from comfy_api.latest import io
from comfyui_version import __version__ as host_version

from ..i2v_core.errors import I2VError
from ..i2v_core.memory.calibration import calibration_key
from ..i2v_core.memory.device import DeviceFacts
from ..i2v_core.placement.precision import AUTO
from ..i2v_core.planning.plan import Stage
from ..i2v_core.sampling.checkpoint import Checkpointing, CheckpointWhen
from ..i2v_core.units import parse_bytes
from . import host, native_runs
from .host_progress import node_text_sender
from .native.fit import fitted
from .native.services import Services
from .native.vae.fitted_vae import FittedVAE, fitted_vae
from .sockets import CATEGORY
from .validation import checked
from .widgets import checkpoint_input


class VRAMFit(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VVRAMFit",
            display_name="VRAM Fit",
            category=CATEGORY,
            description="Runs a video model from core's loaders within the device memory you have, with the same "
            "result: long layers run in chunks, as few as the budget needs. Place it between the loader (or LoRA) and "
            "the sampler.",
            search_aliases=["vram", "low vram", "out of memory", "oom", "block swap", "offload", "memory budget"],
            inputs=[
                io.Model.Input("model", tooltip="The model from a loader or a LoRA node."),
                io.Model.Input("model_2", optional=True, tooltip="A second model, such as Wan 2.2's low-noise expert."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE that decodes and encodes the video."),
                io.String.Input(
                    "budget",
                    default=AUTO,
                    tooltip="Device memory that the model may use, weights included: auto for what is free, or an "
                    "amount such as 6 or 6GiB. Default auto.",
                ),
                checkpoint_input(
                    "When to save to disk what the sampler has done, with any sampler: auto saves every 30 seconds in "
                    "runs of more than 2 minutes, and when such a run is cancelled or fails; every step saves after "
                    "each step; off never saves. Queue the same video again to resume. Unfinished videos take 5 GiB "
                    "of disk at most."
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model, for any sampler."),
                io.Model.Output("model_2", tooltip="The second model, for any sampler, if one is connected."),
                io.Vae.Output(
                    "vae",
                    tooltip="The VAE, for any node that takes one. It decodes and encodes within the budget, with the "
                    "result of an untiled decode, also in tiled nodes. If the report does not name it: unchanged.",
                ),
                io.String.Output("report", tooltip="Which layers run within the budget, and which run as they are."),
            ],
        )

    @classmethod
    def validate_inputs(cls, budget: Any) -> bool | str:
        try:
            if budget is not None:
                _limit_bytes(budget)
        except I2VError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls, model: Any, budget: str, model_2: Any = None, vae: Any = None, checkpoint: str = CheckpointWhen.AUTO.value
    ) -> io.NodeOutput:
        services = Services(
            usable_bytes=_usable(_limit_bytes(budget)),
            check_cancelled=management.throw_exception_if_processing_interrupted,
            say=_say_here_and_on(node_text_sender()),
            free_bytes=host.unheld_bytes,
            device_facts=_device_facts,
            learn=_learn,
            keep_report=native_runs.keep,
            checkpointing=Checkpointing(folder=host.checkpoint_folder(), when=CheckpointWhen(checkpoint)),
            is_whole=host.has_succeeded,
        )
        report: list[str] = []
        if vae is not None:
            vae, line = fitted_vae(vae, services)
            report.append(line)
        if isinstance(vae, FittedVAE):
            services = replace(services, check_latent=partial(vae.passes.check_latent, vae))
        fits = [fitted(it, services) for it in (model, model_2) if it is not None]
        models = [it for it, _ in fits] + [None] * (2 - len(fits))
        text = "\n".join([*(line for _, line in fits), *report])
        return io.NodeOutput(models[0], models[1], vae, text, ui={"text": [text]})


def _say_here_and_on(own_node: Callable[[str], None]) -> Callable[[str], None]:
    """Shows a line on this node, and on the one that runs then, which is the sampler."""

    def say(line: str) -> None:
        own_node(line)
        node_text_sender()(line)

    return say


def _device_facts(model: str) -> DeviceFacts:
    return host.calibrated_device(_learned_as(model), management.get_torch_device())


def _learn(model: str, facts: DeviceFacts, predicted_bytes: int, measured_bytes: int) -> None:
    host.calibration_store().record(
        calibration_key(facts.name, _learned_as(model)),
        Stage.SAMPLE.value,
        predicted_bytes=predicted_bytes,
        measured_bytes=measured_bytes,
    )


def _learned_as(model: str) -> str:
    """A model's name in the calibration: each host has another version of its classes."""
    return f"{model}, ComfyUI {host_version}"


def _limit_bytes(budget: str) -> int | None:
    """The user's budget; None for what is free. Raises `BadInputError` for what is no amount."""
    return None if budget.strip().lower() == AUTO else parse_bytes(budget)


def _usable(limit_bytes: int | None) -> Callable[[], int]:
    """Reads what may be used when a run is planned: a budget that is named is spent whole, of what is merely free the
    host keeps its reserve.
    """

    def usable_bytes() -> int:
        free_bytes = host.reclaimable_bytes()
        return max(0, free_bytes - host.reserve_bytes()) if limit_bytes is None else min(limit_bytes, free_bytes)

    return usable_bytes
