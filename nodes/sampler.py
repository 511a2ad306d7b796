"""Chunked Sampler."""

from __future__ import annotations

from comfy_api.latest import io

from ..i2v_core import stages
from ..i2v_core.families import Conditioning, I2VModel
from ..i2v_core.families.facts import AUTO_SCHEDULER
from ..i2v_core.planning.plan import Plan, Stage
from ..i2v_core.sampling.checkpoint import Checkpointing, CheckpointWhen
from ..i2v_core.sampling.schedulers import SCHEDULERS
from . import host
from .checked import checked
from .sockets import CATEGORY, REPORTS, I2VConditioningSocket, model_input, plan_input


class ChunkedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VChunkedSampler",
            display_name="Chunked Sampler",
            category=CATEGORY,
            description="Makes the video's latents. Layers run in pieces where the plan says so, with the same result.",
            search_aliases=["i2v sampler", "ksampler", "image to video sampler", "low vram sampler", "denoise video"],
            inputs=[
                model_input(),
                plan_input(),
                I2VConditioningSocket.Input("conditioning", tooltip="From I2V Encode, made with the same plan."),
                io.Int.Input(
                    "steps",
                    default=30,
                    min=1,
                    max=stages.MAX_STEPS,
                    tooltip="Number of denoising steps; more take longer. Default 30.",
                ),
                io.Float.Input(
                    "cfg",
                    default=9.0,
                    min=1.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Strength of guidance towards the prompt, without unit; 1 turns it off. I2VGen-XL: about "
                    "9. Stable Video Diffusion: about 3, towards the picture, rising from 1 in the first frame. "
                    "Default 9.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Number that the starting noise is made from. The same seed gives the same video on any "
                    "device. Default 0.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default=AUTO_SCHEDULER,
                    tooltip="How a step is taken. auto is the model's own: ddim for I2VGen-XL, euler for Stable Video "
                    "Diffusion, which takes no other. Default auto.",
                ),
                io.Combo.Input(
                    "checkpoint",
                    options=[when.value for when in CheckpointWhen],
                    default=CheckpointWhen.AUTO.value,
                    optional=True,
                    tooltip="When what is sampled so far is kept on disk: auto every half minute of runs that take "
                    "more than two, and when such a run is cancelled or fails; or after every step; or never. The "
                    "same video queued again goes on from there. Default auto.",
                ),
            ],
            outputs=[io.Latent.Output("latent", tooltip="Latents, one a frame, as any VAE decode node takes them.")],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: I2VModel,
        plan: Plan,
        conditioning: Conditioning,
        steps: int,
        cfg: float,
        seed: int,
        scheduler: str,
        checkpoint: str = CheckpointWhen.AUTO.value,
    ) -> io.NodeOutput:
        checkpointing = Checkpointing(folder=host.checkpoint_folder(), when=CheckpointWhen(checkpoint))
        settings = stages.SamplerSettings(steps=steps, cfg=cfg, seed=seed, scheduler=scheduler)
        with host.stage(Stage.SAMPLE, model, plan, conditioning.preview_factors) as (fitting, runtime, notes):
            samples, report = stages.sample(model, fitting, conditioning, settings, runtime, checkpointing)
        shown = host.concluded(report, notes)
        return io.NodeOutput({"samples": samples, REPORTS: [*conditioning.reports, *shown["i2v_stage"]]}, ui=shown)
