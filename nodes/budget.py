"""VRAM Budget."""

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

_reading = HysteresisReading()


class VRAMBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VVRAMBudget",
            display_name="VRAM Budget",
            category=CATEGORY,
            description="Predicts the peak of every stage before anything runs, and plans the fastest way that fits. "
            "A request that cannot fit is refused here, with the nearest that would.",
            search_aliases=["vram calculator", "memory budget", "memory planner", "low vram", "i2v plan", "chunk size"],
            is_output_node=True,
            inputs=[
                model_input(),
                io.Int.Input(
                    "width", default=512, min=64, max=8192, step=8, tooltip="Width of the video in pixels. Default 512."
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=64,
                    max=8192,
                    step=8,
                    tooltip="Height of the video in pixels. Default 512.",
                ),
                io.Int.Input(
                    "frames", default=16, min=1, max=4096, tooltip="Length of the video in pixel frames. Default 16."
                ),
                io.Boolean.Input(
                    "guidance",
                    default=True,
                    tooltip="Plan for classifier-free guidance (cfg above 1), which runs the denoiser on the prompt "
                    "and on the negative prompt. Default on.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[AUTO, *PRECISIONS],
                    default=AUTO,
                    tooltip="Precision of computation. auto takes the best that the device runs well. Default auto.",
                ),
                io.String.Input(
                    "budget",
                    default=AUTO,
                    tooltip="Device memory that may be used: auto for what is free, or an amount such as 6, 6GiB or "
                    "6144MiB (a bare number is in GiB). Default auto.",
                ),
                io.Float.Input(
                    "reserve_gib",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip="Device memory in GiB to leave to other programs, beside what ComfyUI reserves. Default 0.",
                ),
                io.Boolean.Input(
                    "allow_approximate",
                    default=False,
                    optional=True,
                    tooltip="Where nothing exact fits, allow what changes the result: a little, the denoiser's weights "
                    "in 8 bits; then, more, windows over the frames. Default off.",
                ),
                io.Combo.Input(
                    "plan_for",
                    options=[THIS_MACHINE, *CARDS],
                    default=THIS_MACHINE,
                    optional=True,
                    tooltip="What the plan is for: this machine, or another card by its size, to prepare a workflow. "
                    f"Of such a card {format_gib(SYSTEM_SHARE_BYTES)} are left to its system, and it computes in fp16 "
                    "or bf16. A plan for another card is to look at: where it is run all the same, each stage plans "
                    "again for this machine, within that card's memory. Default this machine.",
                ),
            ],
            outputs=[
                I2VPlanSocket.Output("plan", tooltip="The plan, for the other nodes of this pack."),
                io.String.Output("report", tooltip="The plan in words."),
                io.Int.Output("chunk_size", tooltip="Frames that the denoiser takes at once at full size."),
                io.Int.Output("tile_size", tooltip="Tile of the decoder in pixels; 0 where whole frames are decoded."),
                io.Int.Output("overlap", tooltip="Overlap of the decoder's tiles in pixels; 0, since they are exact."),
                io.Float.Output("peak_gib", tooltip="Highest predicted peak of any stage, in GiB."),
                io.String.Output("precision", tooltip="Precision of computation: fp32, fp16 or bf16."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """The advice depends on free memory too, so the host must not go by the inputs alone; but not on what is free
        beyond a budget that the user names, so that what was made for it stays in the host's cache.
        """
        usable_bytes = min(_reading.update(host.room_bytes()), _named_bytes(inputs.get("budget")))
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
        asked = planner_inputs(
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
        plan = make_plan(asked.request, asked.budget, asked.device)
        text = report(plan)
        if plan_for != THIS_MACHINE:
            text = f"Planned for {plan.device.name}. Run here, each stage plans again for this machine.\n{text}"
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


def _named_bytes(budget: Any) -> float:
    """The budget that the user names; no limit where that is left to what is free, or not to be understood."""
    try:
        return parse_bytes(budget)
    except (BadInputError, AttributeError, TypeError):
        return math.inf
