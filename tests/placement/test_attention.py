"""Choosing attention kernels, and restoring the model's own."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch.nn import functional

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


def test_models_that_leave_it_to_the_dispatcher_are_asked_there(wan_folder: Path) -> None:
    transformer: Any = load_model(wan_folder).modules["transformer"]
    before = transformer.attn_processors
    with attention(transformer, AttentionBackend.XFORMERS):
        assert transformer.attn_processors == before
        assert {processor._attention_backend.value for processor in before.values()} == {"xformers"}
    assert {processor._attention_backend for processor in before.values()} == {None}


def test_sage_takes_the_calls_that_it_can_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests which calls would reach SageAttention, which itself needs a CUDA card."""
    seen: list[tuple[int, ...]] = []

    def sageattn(query: torch.Tensor, *_: torch.Tensor, **options: object) -> torch.Tensor:
        assert options == {"tensor_layout": "HND", "is_causal": False, "sm_scale": 0.5}
        seen.append(tuple(query.shape))
        return query

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))
    attend = functional.scaled_dot_product_attention
    half, single = torch.ones(1, 2, 3, 64, dtype=torch.bfloat16), torch.ones(1, 2, 3, 64)
    narrow = torch.ones(1, 2, 3, 8, dtype=torch.bfloat16)
    mask = torch.zeros(3, 3, dtype=torch.bfloat16)
    with attention(torch.nn.Identity(), AttentionBackend.SAGE):
        attend(half, half, half, dropout_p=0.0, scale=0.5)
        attend(single, single, single)
        attend(narrow, narrow, narrow)
        attend(half, half, half, attn_mask=mask)
        attend(query=half, key=half, value=half, attn_mask=None, scale=0.5)  # as diffusers' dispatcher calls it
    attend(half, half, half)
    assert seen == [(1, 2, 3, 64), (1, 2, 3, 64)]
