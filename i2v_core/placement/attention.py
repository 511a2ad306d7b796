"""Which kernels attention runs on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum
from typing import Any

from torch import nn


class AttentionBackend(str, Enum):
    """PyTorch's own fused attention, or xformers where it is installed. Both need no more memory than their output."""

    SDPA = "sdpa"
    XFORMERS = "xformers"


@contextmanager
def attention(module: nn.Module, backend: AttentionBackend) -> Generator[None]:
    """While the context lasts, a diffusers module's attention runs on the backend; then on what it ran on before."""
    if backend is AttentionBackend.SDPA:
        yield
        return
    from diffusers.models.attention_processor import XFormersAttnProcessor

    model: Any = module
    before = model.attn_processors
    # The processors' dictionary is emptied when it is set, so each time it is given a copy.
    model.set_attn_processor(dict.fromkeys(before, XFormersAttnProcessor()))
    try:
        yield
    finally:
        model.set_attn_processor(dict(before))
