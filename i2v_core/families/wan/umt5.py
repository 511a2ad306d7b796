"""The UMT5 text encoder.

Chung et al., "UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual Pretraining", 2023.

Shape legend: L tokens, D embedding width.
"""

from __future__ import annotations

import html
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...memory.meter import host_memory
from ...placement.offload import fp32_host_copy
from .. import clip
from ..base import Placed

EMBEDDINGS = frozenset({"shared", "encoder.embed_tokens"})
"""Submodules with a fifth of the encoder's weights, of which a prompt needs a few rows: read in host memory."""


def encode_text(text_encoder: Placed, tokenizer: Any, text: str, length: int) -> Tensor:
    """Return hidden states (1, L, D) of `length` tokens, in fp32, in host memory, with zeros after the text."""
    words = " ".join(html.unescape(html.unescape(text)).split())
    with host_memory():
        token_ids = clip.tokenize(tokenizer, words, length)
        mask = token_ids != tokenizer.pad_token_id
    on_device = mask.to(text_encoder.device)
    states = _encoded(text_encoder, token_ids, on_device.long())
    return fp32_host_copy(states.masked_fill(~on_device[..., None], 0))


def trace_text(text_encoder: Placed, length: int) -> Tensor:
    """Run the encoder alone, on meta tensors, for tracing.

    transformers 5 reads the mask's values to see whether it is full, which a meta tensor has not; but it accepts the
    square mask that it would make of it.
    """
    import transformers

    token_ids = torch.zeros(1, length, dtype=torch.long, device=text_encoder.device)
    square = int(transformers.__version__.split(".")[0]) >= 5
    shape = (1, 1, length, length) if square else (1, length)
    mask = torch.ones(shape, dtype=torch.bool if square else torch.long, device=text_encoder.device)
    return _encoded(text_encoder, token_ids, mask)


def _encoded(text_encoder: Placed, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Return hidden states (1, L, D), on the device."""
    rows = text_encoder.module.get_input_embeddings().weight
    if rows.device == text_encoder.device:
        embedded = functional.embedding(token_ids.to(rows.device), rows)
    else:
        with host_memory():
            looked_up = functional.embedding(token_ids, rows)
        embedded = looked_up.to(text_encoder.device)
    return text_encoder.module(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
