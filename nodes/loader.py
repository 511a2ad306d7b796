"""I2V Loader."""

from __future__ import annotations

from comfy_api.latest import io

from ..i2v_core.families import load_model
from . import host
from .sockets import CATEGORY, I2VModelSocket


class Loader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VLoader",
            display_name="I2V Loader",
            category=CATEGORY,
            description="Loads an image-to-video model into host RAM. Nothing is put on the graphics card yet: each "
            "stage brings in what it needs and takes it out again.",
            search_aliases=[
                "image to video",
                "i2v",
                "I2VGen-XL",
                "SVD",
                "stable video diffusion",
                "load video model",
                "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(host.model_folders()),
                    default=host.DEMO_MODEL,
                    tooltip="The bundled demo, or a folder in diffusers layout under models/diffusers. "
                    "Only safetensors are read. Default: the demo.",
                )
            ],
            outputs=[I2VModelSocket.Output("model", tooltip="The model, with its weights in host RAM.")],
        )

    @classmethod
    def execute(cls, model: str) -> io.NodeOutput:
        return io.NodeOutput(load_model(host.model_folder(model)))
