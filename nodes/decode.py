"""VAE Tiled Decode."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..i2v_core import stages
from ..i2v_core.families import I2VModel
from ..i2v_core.planning.adjust import with_tile
from ..i2v_core.planning.plan import Plan, Stage
from . import host
from .sockets import CATEGORY, model_input, plan_input


class VAETiledDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VVAETiledDecode",
            display_name="VAE Tiled Decode",
            category=CATEGORY,
            description="Turns latents into frames, a few at a time and in tiles where the plan needs them. Frames go "
            "to host memory as they are made.",
            search_aliases=["i2v decode", "vae decode tiled", "decode video", "low vram decode"],
            inputs=[
                model_input(),
                plan_input(),
                io.Latent.Input("latent", tooltip="Latents from Chunked Sampler, or one a frame from elsewhere."),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=8192,
                    step=8,
                    tooltip="Side of a tile in pixels, a multiple of 8 and at least 64; 0 leaves it to the plan. "
                    "Tiles blend their borders, so the result is close to whole frames but not the same. Default 0.",
                ),
                io.Int.Input(
                    "overlap",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Overlap of neighbouring tiles in pixels, at most half a tile; 0 leaves it to the plan "
                    "(a quarter of a tile). Default 0.",
                ),
            ],
            outputs=[io.Image.Output("images", tooltip="The frames, in host memory.")],
        )

    @classmethod
    def execute(
        cls, model: I2VModel, plan: Plan, latent: dict[str, Any], tile_size: int, overlap: int
    ) -> io.NodeOutput:
        if tile_size or overlap:
            plan = with_tile(plan, tile_size, overlap)
        with host.stage(Stage.DECODE, model, plan) as (fitting, runtime, notes):
            frames_FHWC, report = stages.decode(model, fitting, latent["samples"], runtime)
        host.learn(fitting, report)
        return io.NodeOutput(frames_FHWC, ui=host.stage_ui(report, notes))
