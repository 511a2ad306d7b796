"""Nodes `I2V Save Latent` and `I2V Load Latent`."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..i2v_core.errors import I2VError
from ..i2v_core.latent_file import SUFFIX, load_latent, save_latent
from ..i2v_core.planning.plan import Plan
from . import host_files
from .sockets import CATEGORY, plan_input
from .validation import checked
from .widgets import filename_prefix_input


class SaveLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VSaveLatent",
            display_name="I2V Save Latent",
            category=CATEGORY,
            description="Saves a latent to disk with the size and model it was made for, to decode it again later "
            "without sampling.",
            search_aliases=["save latent", "export latent", "keep latent", "latent to file"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Latent.Input("latent", tooltip="The latent from Chunked Sampler."),
                plan_input(),
                filename_prefix_input("latents/i2v"),
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="The same latent, for the next nodes."),
                io.String.Output("filename", tooltip="Full path of the file."),
            ],
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: Any) -> bool | str:
        try:
            if filename_prefix is not None:
                host_files.check_prefix(filename_prefix)
        except I2VError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(cls, latent: dict[str, Any], plan: Plan, filename_prefix: str) -> io.NodeOutput:
        size = plan.request.size
        output = host_files.new_output(filename_prefix, SUFFIX, size.width_pixels, size.height_pixels)
        facts = save_latent(output.path, latent["samples"], plan, host_files.workflow_metadata(cls.hidden))
        text = f"{output.name}: {facts}"
        return io.NodeOutput(latent, str(output.path), ui={"latents": [output.as_result()], "text": [text]})


class LoadLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VLoadLatent",
            display_name="I2V Load Latent",
            category=CATEGORY,
            description="Loads a latent from ComfyUI's output or input folder. Connect its size to VRAM Budget, so "
            "that the plan matches the latent.",
            search_aliases=["load latent", "open latent", "latent from file", "decode again"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host_files.latent_names(),
                    default=host_files.DEMO_LATENT,
                    tooltip="A file from I2V Save Latent, or another .latent file with one latent per frame; those in "
                    "the output folder end in [output]. Default: the demo's.",
                )
            ],
            outputs=[
                io.Latent.Output("latent", tooltip="The latent, for VAE Tiled Decode or I2V Save Video."),
                io.Int.Output("width", tooltip="Width of its video in pixels."),
                io.Int.Output("height", tooltip="Height of its video in pixels."),
                io.Int.Output("frames", tooltip="Length of its video in frames."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: Any) -> bool | str:
        try:
            if file is not None:
                host_files.latent_path(file)
        except I2VError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str) -> Any:
        """Return the file's time and size too: it may be replaced under the same name."""
        facts = host_files.latent_path(file).stat()
        return (file, facts.st_mtime_ns, facts.st_size)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        samples, facts = load_latent(host_files.latent_path(file))
        size = facts.size
        return io.NodeOutput(
            {"samples": samples}, size.width_pixels, size.height_pixels, size.frames, ui={"text": [str(facts)]}
        )
