"""Node `VRAM Budget`."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io

from ..i2v_core.errors import BadInputError
from ..i2v_core.families import I2VModel
from ..i2v_core.placement.precision import AUTO, PRECISIONS
from ..i2v_core.planning.cards import CARDS, SYSTEM_SHARE_BYTES, THIS_MACHINE
from ..i2v_core.planning.planner import make_plan
from ..i2v_core.planning.report import plan_as_dict, report
from ..i2v_core.units import GIB, format_gib, parse_bytes
from . import host
from .hysteresis import HysteresisReading
from .planner_inputs import planner_inputs
from .sockets import CATEGORY, I2VPlanSocket, model_input
from .validation import checked

_free_memory = HysteresisReading()


class VRAMBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VVRAMBudget",
            display_name="VRAM Budget",
            category=CATEGORY,
            description="Predicts the peak memory of every stage before anything runs, and plans the fastest settings "
            "that fit the budget. If nothing fits, it stops here and suggests what would.",
            search_aliases=["vram calculator", "memory budget", "memory planner", "low vram", "i2v plan", "chunk size"],
            is_output_node=True,
            inputs=[model_input(), *_size_inputs(), *_compute_inputs(), *_memory_inputs(), _plan_for_input()],
            outputs=[
                I2VPlanSocket.Output("plan", tooltip="The plan, for the other nodes of this pack."),
                io.String.Output("report", tooltip="The plan as text."),
                io.Int.Output("chunk_size", tooltip="Frames per chunk in the denoiser's full-resolution layers."),
                io.Int.Output("tile_size", tooltip="Tile size of the decoder in pixels; 0 if it decodes whole frames."),
                io.Int.Output("overlap", tooltip="Overlap of the decoder's tiles in pixels; 0, since tiling is exact."),
                io.Float.Output("peak_gib", tooltip="Highest predicted peak of any stage, in GiB."),
                io.String.Output("precision", tooltip="Compute precision: fp32, fp16 or bf16."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """Return the inputs and the usable memory, on which the plan depends too.

        Memory that is free beyond the user's own budget does not count, so that results stay in the host's cache.
        """
        usable_bytes = min(_free_memory.update(host.reclaimable_bytes()), _requested_bytes(inputs.get("budget")))
        return (usable_bytes, *(str(inputs[name]) for name in sorted(inputs) if name != "model"))

    @classmethod
    @checked
    def execute(
        cls,
        model: I2VModel,
        width: int,
        height: int,
        frames: int,
        guidance: bool,
        precision: str,
        budget: str,
        reserve_gib: float,
        allow_approximate: bool = False,
        plan_for: str = THIS_MACHINE,
    ) -> io.NodeOutput:
        planning = planner_inputs(
            model.architecture,
            width=width,
            height=height,
            frames=frames,
            guidance=guidance,
            precision=precision,
            budget=budget,
            reserve_gib=reserve_gib,
            allow_approximate=allow_approximate,
            plan_for=plan_for,
        )
        plan = make_plan(planning.request, planning.budget, planning.device)
        text = report(plan)
        if plan_for != THIS_MACHINE:
            text = f"Planned for {plan.device.name}. If run here, each stage is planned again for this machine.\n{text}"
        return io.NodeOutput(
            plan,
            text,
            plan.chunk_size,
            plan.decode.settings.tiling.tile_pixels,
            0,
            plan.peak_bytes / GIB,
            plan.precision,
            ui={"text": [text], "i2v_plan": [plan_as_dict(plan)]},
        )


def _size_inputs() -> tuple[io.Input, ...]:
    return (
        io.Int.Input(
            "width", default=512, min=64, max=8192, step=8, tooltip="Width of the video in pixels. Default 512."
        ),
        io.Int.Input(
            "height", default=512, min=64, max=8192, step=8, tooltip="Height of the video in pixels. Default 512."
        ),
        io.Int.Input(
            "frames",
            default=16,
            min=1,
            max=4096,
            tooltip="Length of the video in frames (not latent frames). Default 16.",
        ),
    )


def _compute_inputs() -> tuple[io.Input, ...]:
    return (
        io.Boolean.Input(
            "guidance",
            default=True,
            tooltip="Plan for classifier-free guidance (cfg above 1), which runs the denoiser on the negative prompt "
            "as well. Default on.",
        ),
        io.Combo.Input(
            "precision",
            options=[AUTO, *PRECISIONS],
            default=AUTO,
            tooltip="Compute precision. auto picks the best that runs well on the device. Default auto.",
        ),
    )


def _memory_inputs() -> tuple[io.Input, ...]:
    return (
        io.String.Input(
            "budget",
            default=AUTO,
            tooltip="Device memory that may be used: auto for all that is free, or an amount such as 6, 6GiB or "
            "6144MiB (a bare number is in GiB). Default auto.",
        ),
        io.Float.Input(
            "reserve_gib",
            default=0.0,
            min=0.0,
            max=1024.0,
            step=0.1,
            tooltip="Device memory in GiB to leave to other programs, on top of ComfyUI's own reserve. Default 0.",
        ),
        io.Boolean.Input(
            "allow_approximate",
            default=False,
            optional=True,
            tooltip="If no exact plan fits, allow approximations: first 8-bit weights for the denoiser, a small "
            "change; then context windows over the frames, a larger one. Default off.",
        ),
    )


def _plan_for_input() -> io.Input:
    return io.Combo.Input(
        "plan_for",
        options=[THIS_MACHINE, *CARDS],
        default=THIS_MACHINE,
        optional=True,
        tooltip="Device to plan for: this machine, or a card of another size, to prepare a workflow for it. Of such a "
        f"card {format_gib(SYSTEM_SHARE_BYTES)} are left to its system, and it computes in fp16 or bf16. The plan for "
        "another card is a preview: if you run it here, each stage is planned again for this machine, within that "
        "card's memory. Default this machine.",
    )


def _requested_bytes(budget: Any) -> float:
    """Return the budget that the user sets; infinity for `auto` and for values that cannot be parsed."""
    try:
        return parse_bytes(budget)
    except (BadInputError, AttributeError, TypeError):
        return math.inf
