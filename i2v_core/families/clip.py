"""The CLIP text and vision encoders that several families share.

Shape legend: L tokens, D embedding width, H/W height and width in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ..errors import BadInputError
from ..memory.meter import host_memory
from .base import Placed
from .pictures import to_tensor

logger = logging.getLogger(__name__)

_LONGEST_CHARACTERS = 20_000
"""Of a prompt: a tokenizer takes a second for some 100,000, and cannot be interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInput:
    """How the vision encoder wants its picture: size in pixels, mean and deviation of each colour."""

    width_pixels: int
    height_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionInput:
        """From a preprocessor_config.json, whose crop_size is a number or a height and a width.

        Raises:
            KeyError, TypeError, ValueError: the config holds something else.
        """
        crop: Any = config["crop_size"]
        height, width = (crop, crop) if isinstance(crop, int) else (int(crop["height"]), int(crop["width"]))
        if min(height, width) < 1:
            raise ValueError(f"a crop_size of {crop} is not possible")
        return cls(
            width_pixels=width,
            height_pixels=height,
            mean=_colours(config["image_mean"]),
            std=_colours(config["image_std"]),
        )


def _colours(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def tokenize(tokenizer: Any, text: str, length: int | None = None) -> Tensor:
    """Token ids (1, L), padded or cut to this length, or the tokenizer's own; what is cut off is logged.

    Raises:
        BadInputError: the text is longer than any that could be meant.
    """
    length = int(tokenizer.model_max_length) if length is None else length
    if len(text) > _LONGEST_CHARACTERS:
        raise BadInputError(
            f"a prompt of {len(text):,} characters is too long",
            f"the model reads the first {length} tokens, some {4 * length} characters of it",
        )
    ids = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    whole = tokenizer(text, return_tensors="pt").input_ids
    if whole.shape[-1] > length:
        cut = tokenizer.batch_decode(whole[:, length - 1 : -1])[0]
        logger.warning("The prompt is longer than %d tokens; this is cut off: %s", length, cut)
    return ids


def encode_text(text_encoder: nn.Module, token_ids: Tensor, clip_skip: int) -> Tensor:
    """Hidden states (1, L, D), `clip_skip` layers before the last, through the final layer norm."""
    hidden_states = text_encoder(token_ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    # transformers 5 has the norm on the model itself, older ones on its inner `text_model`.
    body: Any = getattr(text_encoder, "text_model", text_encoder)
    return body.final_layer_norm(hidden_states)


def encode_picture(image_encoder: Placed, picture: Image.Image, wanted: VisionInput) -> Tensor:
    """Projected image embedding (1, 1, D) of a square picture."""
    resized = picture.resize((wanted.width_pixels, wanted.height_pixels), resample=Image.Resampling.BILINEAR)
    with host_memory():
        pixels_13HW = to_tensor(resized)
    return _encode(image_encoder, pixels_13HW, wanted)


def encode_antialiased(image_encoder: Placed, centred_13HW: Tensor, wanted: VisionInput) -> Tensor:
    """Projected image embedding (1, 1, D) of a picture in -1…1 of any shape, as Stable Video Diffusion was trained on:
    blurred as much as it shrinks, then scaled by bicubic interpolation with its corners kept.
    """
    size = (wanted.height_pixels, wanted.width_pixels)
    with host_memory():
        blurred_13HW = centred_13HW
        for dim, side in zip((2, 3), size, strict=True):
            blurred_13HW = _blurred(blurred_13HW, dim, (centred_13HW.shape[dim] / side - 1) / 2)
        scaled_13HW = functional.interpolate(blurred_13HW, size=size, mode="bicubic", align_corners=True)
        pixels_13HW = (scaled_13HW + 1) / 2
    return _encode(image_encoder, pixels_13HW, wanted)


def _blurred(picture_13HW: Tensor, dim: int, sigma_pixels: float) -> Tensor:
    """A Gaussian of two deviations to each side along one dimension, the picture mirrored at its edges."""
    sigma_pixels = max(sigma_pixels, 0.001)
    radius_pixels = int(max(4 * sigma_pixels, 3)) // 2
    offsets = torch.arange(-radius_pixels, radius_pixels + 1, dtype=torch.float32)
    weights = torch.exp(-offsets.square() / (2 * sigma_pixels**2))
    shape = [1, 1, 1, 1]
    shape[dim] = -1
    kernel = (weights / weights.sum()).view(shape).repeat(3, 1, 1, 1)
    margins = (0, 0, radius_pixels, radius_pixels) if dim == 2 else (radius_pixels, radius_pixels, 0, 0)
    return functional.conv2d(functional.pad(picture_13HW, margins, mode="reflect"), kernel, groups=3)


def _encode(image_encoder: Placed, pixels_13HW: Tensor, wanted: VisionInput) -> Tensor:
    with host_memory():
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (wanted.mean, wanted.std))
        normed_13HW = (pixels_13HW - mean) / std
    on_device_13HW = torch.empty_like(normed_13HW, device=image_encoder.device, dtype=image_encoder.dtype)
    return image_encoder.module(on_device_13HW.copy_(normed_13HW)).image_embeds.unsqueeze(1)
