"""Widgets shared by several nodes, each with its limits, default and tooltip.

A `note` is added to the tooltip before the default: what is special about the widget on that node.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..i2v_core import stages
from ..i2v_core.batch.jobs.job import MAX_SEED
from ..i2v_core.families.facts import AUTO_SCHEDULER
from ..i2v_core.sampling.checkpoint import CheckpointWhen
from ..i2v_core.sampling.schedulers import SCHEDULERS
from ..i2v_core.video import FORMATS


def filename_prefix_input(default: str) -> io.Input:
    text = (
        "File name within ComfyUI's output folder, with subfolders if you like. %date%, %date:yyyy-MM-dd hhmmss%, "
        "%year%, %month%, %day%, %hour%, %minute%, %second%, %width% and %height% are filled in, and a number is "
        "appended."
    )
    return io.String.Input("filename_prefix", default=default, tooltip=_tooltip(text, "", f"Default {default}."))


def negative_prompt_input(note: str = "", *, dynamic_prompts: bool) -> io.Input:
    return io.String.Input(
        "negative_prompt",
        multiline=True,
        dynamic_prompts=dynamic_prompts,
        default="",
        tooltip=_tooltip("What to avoid in the video; used with guidance only.", note, "Default: empty."),
    )


def steps_input(note: str = "") -> io.Input:
    return io.Int.Input(
        "steps",
        default=30,
        min=1,
        max=stages.MAX_STEPS,
        tooltip=_tooltip("Number of denoising steps; more take longer.", note, "Default 30."),
    )


def cfg_input(note: str = "") -> io.Input:
    text = (
        "Guidance scale towards the prompt, without unit; 1 turns guidance off. I2VGen-XL: about 9. Stable Video "
        "Diffusion: about 3, towards the image, rising from 1 in the first frame."
    )
    return io.Float.Input("cfg", default=9.0, min=1.0, max=100.0, step=0.05, tooltip=_tooltip(text, note, "Default 9."))


def seed_input(note: str = "", *, changes_each_run: bool) -> io.Input:
    """Build the seed widget; with `changes_each_run` the page adds a widget that can change it after each run."""
    text = "Seed of the starting noise, a whole number. The same seed gives the same video on any device."
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=changes_each_run,
        tooltip=_tooltip(text, note, "Default 0."),
    )


def scheduler_input(note: str = "") -> io.Input:
    text = (
        f"Sampling algorithm. {AUTO_SCHEDULER} uses the model's own: ddim for I2VGen-XL, euler for Stable Video "
        "Diffusion (its only one), unipc for Wan."
    )
    return io.Combo.Input(
        "scheduler",
        options=list(SCHEDULERS),
        default=AUTO_SCHEDULER,
        tooltip=_tooltip(text, note, f"Default {AUTO_SCHEDULER}."),
    )


def checkpoint_input(text: str) -> io.Input:
    """Build the widget that says when a run is saved; `text` begins its tooltip, which differs by node."""
    return io.Combo.Input(
        "checkpoint",
        options=[when.value for when in CheckpointWhen],
        default=CheckpointWhen.AUTO.value,
        optional=True,
        tooltip=f"{text} Default auto.",
    )


def format_input(note: str = "") -> io.Input:
    text = (
        "File format: mp4 is H.264, which plays everywhere; webm is VP9; gif has 256 colours per frame; png is a "
        "folder of images."
    )
    return io.Combo.Input("format", options=list(FORMATS), default="mp4", tooltip=_tooltip(text, note, "Default mp4."))


def fps_input(note: str = "") -> io.Input:
    text = "Playback speed in frames per second; a gif allows up to 50."
    return io.Float.Input("fps", default=8.0, min=1.0, max=120.0, step=0.01, tooltip=_tooltip(text, note, "Default 8."))


def _tooltip(text: str, note: str, default: str) -> str:
    return " ".join(part for part in (text, note, default) if part)
