"""CLIP text and vision encoders that several families share.

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
"""Longest prompt: a tokenizer takes a second for some 100,000 characters, and cannot be interrupted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInput:
    """Picture that a vision encoder takes: size in pixels, and mean and standard deviation of each colour."""

    width_pixels: int
    height_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionInput:
        """Read a preprocessor_config.json, whose crop_size is a number or a height and a width.

        Raises:
            KeyError, TypeError, ValueError: the config lacks a value, or holds another kind of value.
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
    """Return token ids (1, L), padded or truncated to `length` (None: the tokenizer's own); truncated text is logged.

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
    uncut = tokenizer(text, return_tensors="pt").input_ids
    if uncut.shape[-1] > length:
        cut = tokenizer.batch_decode(uncut[:, length - 1 : -1])[0]
        logger.warning("The prompt is longer than %d tokens; this is cut off: %s", length, cut)
    return ids


def encode_text(text_encoder: nn.Module, token_ids: Tensor, clip_skip: int) -> Tensor:
    """Return hidden states (1, L, D) of `clip_skip` layers before the last, after the final layer norm."""
    hidden_states = text_encoder(token_ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    # transformers 5 has the norm on the model itself, older ones on its inner `text_model`.
    body: Any = getattr(text_encoder, "text_model", text_encoder)
    return body.final_layer_norm(hidden_states)


def encode_picture(image_encoder: Placed, picture: Image.Image, wanted: VisionInput) -> Tensor:
    """Return the projected image embedding (1, 1, D) of a square picture."""
    resized = picture.resize((wanted.width_pixels, wanted.height_pixels), resample=Image.Resampling.BILINEAR)
    with host_memory():
        pixels_13HW = to_tensor(resized)
    return _encode(image_encoder, pixels_13HW, wanted)


def encode_antialiased(image_encoder: Placed, centred_13HW: Tensor, wanted: VisionInput) -> Tensor:
    """Return the projected image embedding (1, 1, D) of a picture in -1…1 of any shape, resized with antialiasing.

    As in Stable Video Diffusion's training, the picture is blurred in proportion to its downscaling, then scaled by
    bicubic interpolation with aligned corners.
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
    """Return the picture blurred along a dimension, by a Gaussian cut off at two deviations, with mirrored edges."""
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
