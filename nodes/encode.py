"""Node `I2V Encode`."""

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
            description="Encodes the image and the prompts into conditioning. The encoders are on the device only "
            "while they run.",
            search_aliases=["i2v prompt", "image to video conditioning", "clip text encode", "clip vision encode"],
            inputs=[
                model_input(),
                plan_input(),
                io.Image.Input(
                    "image",
                    tooltip="First frame of the video. It is scaled and cropped to the plan's size; of a batch, the "
                    "first image is used.",
                ),
                *_prompt_inputs(),
                _fps_input(),
                *_svd_inputs(),
            ],
            outputs=[
                I2VConditioningSocket.Output(
                    "conditioning", tooltip="Conditioning for the sampler, at the size of the plan."
                )
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
        inputs = Prompt(
            image_FHWC=image,
            text=prompt,
            negative_text=negative_prompt,
            fps=fps,
            motion_bucket=motion_bucket,
            noise_augmentation=noise_augmentation,
        )
        with host.stage(Stage.ENCODE, model, plan) as (fitting, runtime, notes):
            conditioning, report = stages.encode(model, fitting, inputs, runtime)
        shown = host.finish_stage(report, notes)
        return io.NodeOutput(replace(conditioning, reports=tuple(shown["i2v_stage"])), ui=shown)


def _prompt_inputs() -> tuple[io.Input, ...]:
    return (
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            default="",
            tooltip="What happens in the video. Stable Video Diffusion takes no prompt. Default: empty.",
        ),
        negative_prompt_input(dynamic_prompts=True),
    )


def _fps_input() -> io.Input:
    return io.Int.Input(
        "fps",
        default=16,
        min=1,
        max=240,
        tooltip="Frame rate that the model is conditioned on, in frames per second; it changes the speed of motion, "
        "not the length. Default 16.",
    )


def _svd_inputs() -> tuple[io.Input, ...]:
    """Build the widgets that only Stable Video Diffusion reads, in place of a prompt."""
    return (
        io.Int.Input(
            "motion_bucket",
            default=127,
            min=1,
            max=1023,
            optional=True,
            tooltip="Amount of motion, without unit; higher means more. Stable Video Diffusion only, in place of a "
            "prompt. Default 127.",
        ),
        io.Float.Input(
            "noise_augmentation",
            default=0.02,
            min=0.0,
            max=10.0,
            step=0.01,
            optional=True,
            tooltip="Noise added to the image, as a fraction of its range; higher lets the video depart further from "
            "it. Stable Video Diffusion only. Default 0.02.",
        ),
    )
