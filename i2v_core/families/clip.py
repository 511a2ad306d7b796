"""The CLIP text and vision encoders that several families share.

Shape legend: L tokens, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

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


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids (1, L), padded or cut to the tokenizer's own length; what is cut off is logged.

    Raises:
        BadInputError: the text is longer than any that could be meant.
    """
    length = int(tokenizer.model_max_length)
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
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (wanted.mean, wanted.std))
        pixels = (to_tensor(resized) - mean) / std
    on_device = torch.empty_like(pixels, device=image_encoder.device, dtype=image_encoder.dtype).copy_(pixels)
    return image_encoder.module(on_device).image_embeds.unsqueeze(1)
