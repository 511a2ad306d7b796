"""The clips that a prompt's samplers sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .figures import JSON, Figures, is_link

VRAM_FIT = "I2VVRAMFit"
_FRAMES = ("length", "video_frames")
_LATENTS = ("latent_image", "video_latent", "av_latent", "samples", "latent")
"""Inputs by which a latent passes through a node."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A clip in pixels and frames."""

    width: int
    height: int
    frames: int

    @property
    def pixels(self) -> int:
        """Pixels of all frames."""
        return self.width * self.height * self.frames

    def __str__(self) -> str:
        return f"{self.width}×{self.height}×{self.frames}"


@dataclass(frozen=True, slots=True)
class Sampled:
    """A model that VRAM Fit passes to samplers, and what one of them samples."""

    file: str
    """Name of the model's file, as its loader has it."""
    clip: Clip | None
    """None: the size is that of a file."""


def sampled(prompt: JSON) -> Iterator[Sampled]:
    """Models and clips behind each VRAM Fit of a prompt in the API's format."""
    figures = Figures(prompt)
    for fit, node in prompt.items():
        for slot, name in enumerate(("model", "model_2")):
            if node["class_type"] != VRAM_FIT or name not in node["inputs"]:
                continue
            file = _model_file(figures, node["inputs"][name])
            for sampler in _samplers(prompt, [fit, slot]):
                yield Sampled(file, _clip(figures, prompt[sampler]["inputs"].get("latent_image")))


def _samplers(prompt: JSON, link: list[Any]) -> Iterator[str]:
    """Ids of the samplers that get a model, by a guider or at once."""
    for name, node in prompt.items():
        if link not in node["inputs"].values():
            continue
        if "latent_image" in node["inputs"]:
            yield name
        else:
            yield from _samplers(prompt, [name, 0])


def _model_file(figures: Figures, link: Any) -> str:
    """Name of the file that a chain of nodes on a model begins with; empty: it is not known."""
    while is_link(link):
        inputs = figures.prompt[link[0]]["inputs"]
        file = inputs.get("unet_name") or inputs.get("ckpt_name")
        if isinstance(file, str):
            return file
        if "switch" in inputs:
            link = inputs.get("on_true" if figures.number(inputs["switch"]) else "on_false")
        else:
            link = inputs.get("model")
    return ""


def _clip(figures: Figures, link: Any) -> Clip | None:
    """The clip of a latent, from the node that made it."""
    ratio = 1
    while is_link(link):
        node = figures.prompt[link[0]]
        inputs = node["inputs"]
        frames = next((inputs[name] for name in _FRAMES if name in inputs), None)
        if "width" in inputs and "height" in inputs and frames is not None:
            width, height, length = map(figures.whole, (inputs["width"], inputs["height"], frames))
            return Clip(width * ratio, height * ratio, length) if width and height and length else None
        if node["class_type"] == "LTXVLatentUpsampler":
            ratio *= 2
        link = next((inputs[name] for name in _LATENTS if name in inputs), None)
    return None
