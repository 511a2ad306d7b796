"""I2V Encode."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..i2v_core import stages
from ..i2v_core.families import I2VModel, Prompt
from ..i2v_core.planning.plan import Plan, Stage
from . import host
from .sockets import CATEGORY, I2VConditioningSocket, model_input, plan_input
from .validation import checked
from .widgets import negative_prompt_input


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VEncode",
            display_name="I2V Encode",
            category=CATEGORY,
            description="Encodes the picture and the prompts for the sampler. The encoders are on the device only "
            "while they run.",
            search_aliases=["i2v prompt", "image to video conditioning", "clip text encode", "clip vision encode"],
            inputs=[
                model_input(),
                plan_input(),
                io.Image.Input(
                    "image",
                    tooltip="The picture that becomes frame 0. It is scaled and cut to the plan's size; of a batch "
                    "the first is taken.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What happens in the video, in words. Stable Video Diffusion takes none. Default: empty.",
                ),
                negative_prompt_input(dynamic_prompts=True),
                io.Int.Input(
                    "fps",
                    default=16,
                    min=1,
                    max=240,
                    tooltip="Frames per second that the model is told to imagine; it changes the speed of motion, not "
                    "the length. Default 16.",
                ),
                io.Int.Input(
                    "motion_bucket",
                    default=127,
                    min=1,
                    max=1023,
                    optional=True,
                    tooltip="How much is to move, without unit; more is livelier. For Stable Video Diffusion only, "
                    "which takes it in place of a prompt. Default 127.",
                ),
                io.Float.Input(
                    "noise_augmentation",
                    default=0.02,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    optional=True,
                    tooltip="Noise that is added to the picture, as a share of its range: more lets the video move "
                    "further away from it. For Stable Video Diffusion only. Default 0.02.",
                ),
            ],
            outputs=[
                I2VConditioningSocket.Output("conditioning", tooltip="What the sampler is told, for this plan's size.")
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: I2VModel,
        plan: Plan,
        image: Tensor,
        prompt: str,
        negative_prompt: str,
        fps: int,
        motion_bucket: int = 127,
        noise_augmentation: float = 0.02,
    ) -> io.NodeOutput:
        wish = Prompt(
            image_FHWC=image,
            text=prompt,
            negative_text=negative_prompt,
            fps=fps,
            motion_bucket=motion_bucket,
            noise_augmentation=noise_augmentation,
        )
        with host.stage(Stage.ENCODE, model, plan) as (fitting, runtime, notes):
            conditioning, report = stages.encode(model, fitting, wish, runtime)
        shown = host.concluded(report, notes)
        return io.NodeOutput(replace(conditioning, reports=tuple(shown["i2v_stage"])), ui=shown)
