"""Attention on a twin, which allocates its output as a fused kernel does and computes nothing.

Most of core's layers hand the call's options to attention, which may name another function to run. Some don't; these
find attention under a global name, on which the kernels that run on a card would fail on the meta device. So the layers
of a twin run copies of core's methods that find the function below under this name. Core's own are not touched.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .model import COPY_OF

_NAME = "optimized_attention"


def attention_output(q: Tensor, *_args: Any, **kwargs: Any) -> Tensor:
    """The memory of attention's result, in core's layout."""
    if not kwargs.get("skip_reshape"):
        return torch.empty_like(q)
    batch, heads, tokens, width = q.shape
    shape = (batch, heads, tokens, width) if kwargs.get("skip_output_reshape") else (batch, tokens, heads * width)
    return q.new_empty(shape)


def attention_override(_func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The same, as an option of a call."""
    return attention_output(*args, **kwargs)


def trace_attention(twin: nn.Module) -> None:
    """Let a twin's layer run a copy of its class's forward, if that calls attention."""
    forward: Any = type(twin).forward
    code = getattr(forward, "__code__", None)
    if code is None or _NAME not in code.co_names:
        return
    names = {**forward.__globals__, _NAME: attention_output}
    copy = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    setattr(copy, COPY_OF, forward)
    twin.__dict__["forward"] = MethodType(copy, twin)
