"""Smaller Wan 2.1 models, and the one of text alone, at their real size, as workflow templates have them."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

from .wan import A14B

T2V_14B = {**A14B, "model_type": "t2v", "in_dim": 16}
T2V_1_3B = {**T2V_14B, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
FUN = {**T2V_1_3B, "model_type": "i2v"}


def _text(generator: torch.Generator, _shape: tuple[int, ...]) -> list[Any]:
    return [torch.randn(1, 512, 4096, generator=generator), {}]


def _start_image(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    options = {"concat_latent_image": torch.zeros(shape), "concat_mask": torch.ones(1, 1, *shape[2:])}
    return [torch.randn(1, 512, 4096, generator=generator), options]


def _case(supported_model: str, config: dict[str, Any], conditioning: Any) -> ModelCase:
    return ModelCase(
        supported_model=supported_model, config=config, latent_shape=(1, 16, 21, 60, 104), conditioning=conditioning
    )


CASES = [
    ("Wan 2.1 T2V 14B", "832×480×81", _case("WAN21_T2V", T2V_14B, _text)),
    ("Wan 2.1 T2V 1.3B", "832×480×81", _case("WAN21_T2V", T2V_1_3B, _text)),
    ("Wan 2.1 Fun 1.3B", "832×480×81", _case("WAN21_I2V", {**FUN, "in_dim": 36}, _start_image)),
    ("Wan 2.1 Fun Ctrl 1.3B", "832×480×81", _case("WAN21_FunControl2V", {**FUN, "in_dim": 48}, _text)),
]
