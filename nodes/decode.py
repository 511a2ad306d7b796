"""Node `VAE Tiled Decode`."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..i2v_core import stages
from ..i2v_core.families import I2VModel
from ..i2v_core.planning.adjust import with_tile
from ..i2v_core.planning.plan import Plan, Stage
from ..i2v_core.run_report import RunReport
from . import host
from .sockets import CATEGORY, model_input, plan_input, report_output, reports_of
from .validation import checked


class VAETiledDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VVAETiledDecode",
            display_name="VAE Tiled Decode",
            category=CATEGORY,
            description="Decodes latents into frames, a few at a time and in tiles where the plan needs them, without "
            "seams. Frames go to host memory as they are decoded.",
            search_aliases=["i2v decode", "vae decode tiled", "decode video", "low vram decode"],
            inputs=[
                model_input(),
                plan_input(),
                io.Latent.Input(
                    "latent", tooltip="Latents from Chunked Sampler, or from another node with one latent per frame."
                ),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Largest tile that a layer processes at once, as the side of a square in pixels, at least "
                    "32; 0 uses the plan's. The frames are the same for any tile size. Default 0.",
                ),
                io.Int.Input(
                    "overlap",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Overlap of blended tiles in pixels. Leave it at 0: tiling is exact, so there are no seams "
                    "to blend. Default 0.",
                ),
            ],
            outputs=[io.Image.Output("images", tooltip="The frames, in host memory."), report_output()],
        )

    @classmethod
    @checked
    def execute(
        cls, model: I2VModel, plan: Plan, latent: dict[str, Any], tile_size: int, overlap: int
    ) -> io.NodeOutput:
        with host.stage(Stage.DECODE, model, plan) as (fitting, runtime, notes):
            tiled = with_tile(fitting, tile_size, overlap)
            frames_FHWC, report = stages.decode(model, tiled, latent["samples"], runtime)
        shown = host.finish_stage(report, notes)
        run_report = RunReport(plan=plan, stages=(*reports_of(latent), *shown["i2v_stage"]))
        return io.NodeOutput(frames_FHWC, run_report, ui=shown)
