"""VRAM Budget."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..i2v_core.errors import BadInputError
from ..i2v_core.families import I2VModel, VideoSize
from ..i2v_core.memory.reading import SteadyReading
from ..i2v_core.placement.precision import AUTO, PRECISIONS
from ..i2v_core.planning.planner import make_plan
from ..i2v_core.planning.report import report
from ..i2v_core.planning.request import Budget, Request
from ..i2v_core.units import GIB, parse_bytes
from . import host
from .checked import checked
from .sockets import CATEGORY, I2VPlanSocket, model_input

_reading = SteadyReading()


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
        """The advice depends on free memory too, so the host must not go by the inputs alone."""
        return (_reading.update(host.room_bytes()), *(str(inputs[name]) for name in sorted(inputs) if name != "model"))

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
    ) -> io.NodeOutput:
        request = Request(
            architecture=model.architecture,
            size=VideoSize(width_pixels=width, height_pixels=height, frames=frames),
            guidance=guidance,
            precision=precision,
            allow_approximate=allow_approximate,
        )
        if not 0 <= reserve_gib < float("inf"):
            raise BadInputError(f"a reserve of {reserve_gib} GiB is not possible", "give zero or more")
        limit_bytes = None if budget.strip().lower() == AUTO else parse_bytes(budget)
        # A budget that the user names is theirs to spend whole; of what is merely free, the host keeps its reserve.
        host_reserve_bytes = host.reserve_bytes() if limit_bytes is None else 0
        plan = make_plan(
            request,
            Budget(
                free_bytes=host.room_bytes(),
                limit_bytes=limit_bytes,
                reserve_bytes=int(reserve_gib * GIB) + host_reserve_bytes,
                host_free_bytes=host.host_free_bytes(),
            ),
            host.plan_device(model.architecture),
        )
        text = report(plan)
        return io.NodeOutput(
            plan,
            text,
            plan.chunk_size,
            plan.decode.frames.tile_pixels,
            0,
            plan.peak_bytes / GIB,
            plan.precision,
            ui={"text": [text], "i2v_plan": [plan.as_dict()]},
        )
