"""Choosing attention's kernels, and giving the model its own back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers.models.attention_processor import XFormersAttnProcessor

from i2v_core.families import load_model
from i2v_core.placement.attention import AttentionBackend, attention


def test_the_models_own_processors_come_back(tiny_folder: Path) -> None:
    unet: Any = load_model(tiny_folder).modules["unet"]
    before = unet.attn_processors
    with attention(unet, AttentionBackend.SDPA):
        assert unet.attn_processors == before
    with attention(unet, AttentionBackend.XFORMERS):
        assert {type(processor) for processor in unet.attn_processors.values()} == {XFormersAttnProcessor}
    assert unet.attn_processors == before
    with pytest.raises(RuntimeError, match="inside"), attention(unet, AttentionBackend.XFORMERS):
        raise RuntimeError("inside")
    assert unet.attn_processors == before
