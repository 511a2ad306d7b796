"""Node `Chunked Sampler`."""

from __future__ import annotations

from comfy_api.latest import io

from ..i2v_core import stages
from ..i2v_core.families import Conditioning, I2VModel
from ..i2v_core.planning.plan import Plan, Stage
from ..i2v_core.sampling.checkpoint import Checkpointing, CheckpointWhen
from . import host
from .sockets import CATEGORY, REPORTS, I2VConditioningSocket, model_input, plan_input
from .validation import checked
from .widgets import cfg_input, checkpoint_input, scheduler_input, seed_input, steps_input


class ChunkedSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VChunkedSampler",
            display_name="Chunked Sampler",
            category=CATEGORY,
            description="Samples the video's latents. Layers run in chunks where the plan needs it, with the same "
            "result.",
            search_aliases=["i2v sampler", "ksampler", "image to video sampler", "low vram sampler", "denoise video"],
            inputs=[
                model_input(),
                plan_input(),
                I2VConditioningSocket.Input(
                    "conditioning", tooltip="Conditioning from I2V Encode, made with the same plan."
                ),
                steps_input(),
                cfg_input(),
                seed_input(changes_each_run=True),
                scheduler_input(),
                checkpoint_input(
                    "When to save a checkpoint to disk: auto saves every 30 seconds in runs of more than 2 minutes, "
                    "and when such a run is cancelled or fails; every step saves after each step; off never saves. "
                    "Queue the same video again to resume from it."
                ),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    tooltip="The video's latents; one per frame, for any VAE decode node, unless the model compresses "
                    "time as Wan does.",
                )
            ],
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
        shown = host.finish_stage(report, notes)
        return io.NodeOutput({"samples": samples, REPORTS: [*conditioning.reports, *shown["i2v_stage"]]}, ui=shown)
