"""Node `I2V Loader`."""

from __future__ import annotations

from comfy_api.latest import io

from ..i2v_core.families import load_model
from . import host, host_files
from .sockets import CATEGORY, I2VModelSocket


class Loader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = list(host_files.weight_files())
        return io.Schema(
            node_id="I2VLoader",
            display_name="I2V Loader",
            category=CATEGORY,
            description="Loads an image-to-video model into host memory (RAM). Nothing is on the graphics card yet: "
            "each stage loads what it needs and offloads it afterwards.",
            search_aliases=[
                "image to video",
                "i2v",
                "I2VGen-XL",
                "SVD",
                "stable video diffusion",
                "Wan",
                "GGUF",
                "load video model",
                "low vram",
            ],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(host.model_folders()),
                    default=host.DEMO_MODEL,
                    tooltip="The bundled demo, or a model folder in diffusers format under models/diffusers. Only "
                    "safetensors files are read. Default: the demo.",
                ),
                io.Combo.Input(
                    "transformer_file",
                    options=[host_files.FROM_FOLDER, *files],
                    default=host_files.FROM_FOLDER,
                    optional=True,
                    tooltip="Wan only: a GGUF or safetensors file under models/diffusion_models or models/unet with "
                    "the transformer's weights, used in place of those in the model folder. Quantised files are "
                    "smaller and approximate. For a model with two experts, the high-noise one. Default: the folder's "
                    "weights.",
                ),
                io.Combo.Input(
                    "low_noise_file",
                    options=[host_files.FROM_FOLDER, *files],
                    default=host_files.FROM_FOLDER,
                    optional=True,
                    tooltip="The same for the low-noise expert of Wan 2.2 A14B. Default: the folder's weights.",
                ),
            ],
            outputs=[I2VModelSocket.Output("model", tooltip="The model, with its weights in host memory (RAM).")],
        )

    @classmethod
    def execute(
        cls, model: str, transformer_file: str = host_files.FROM_FOLDER, low_noise_file: str = host_files.FROM_FOLDER
    ) -> io.NodeOutput:
        files = host_files.chosen_files(transformer_file, low_noise_file)
        return io.NodeOutput(load_model(host.model_folder(model), files))
