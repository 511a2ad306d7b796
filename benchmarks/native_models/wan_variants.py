"""Further Wan 2.1 models at their real size, as workflow templates have them."""

from __future__ import annotations

from typing import Any

import torch
from comfy_host.model_case import ModelCase

from .wan import A14B, case_of, start_image, text_alone

W1_3B = {**A14B, "dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
T2V_14B = {**A14B, "in_dim": 16}


def _vace(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
    batch, _, *space = shape
    options = {
        "vace_frames": [torch.zeros(batch, 32, *space)],
        "vace_mask": [torch.ones(batch, 64, *space)],
        "vace_strength": [1.0],
    }
    return [torch.randn(1, 512, 4096, generator=generator), options]


def _smaller(supported_model: str, conditioning: Any, **config: Any) -> ModelCase:
    return case_of(supported_model, {**W1_3B, **config}, conditioning, (1, 16, 21, 60, 104))


VACE = {**T2V_14B, "model_type": "vace", "vace_layers": 8, "vace_in_dim": 96}

CASES = [
    ("Wan 2.1 T2V 14B", "832×480×81", case_of("WAN21_T2V", T2V_14B, text_alone, (1, 16, 21, 60, 104))),
    ("Wan 2.1 VACE 14B", "1280×720×81", case_of("WAN21_Vace", VACE, _vace, (1, 16, 21, 90, 160))),
    ("Wan 2.1 T2V 1.3B", "832×480×81", _smaller("WAN21_T2V", text_alone, in_dim=16)),
    ("Wan 2.1 Fun 1.3B", "832×480×81", _smaller("WAN21_I2V", start_image, model_type="i2v", in_dim=36)),
    ("Wan 2.1 Fun Ctrl 1.3B", "832×480×81", _smaller("WAN21_FunControl2V", text_alone, model_type="i2v", in_dim=48)),
]
