"""Attention on a twin, which allocates its output as a fused kernel does and computes nothing.

Most of core's layers hand the call's options to attention, which may name another function to run. Some don't; these
find attention under a global name, on which the kernels that run on a card would fail on the meta device. So the layers
of a twin run copies of core's methods that find the function below under this name. Core's own are not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from .model import COPY_OF

_NAME = "optimized_attention"


def trace_attention(layer: nn.Module, attention: Callable[..., Tensor]) -> None:
    """Let a twin's layer run a copy of its class's forward, if that calls attention.

    Args:
        attention: core's `optimized_attention_override`, which takes the function that it stands for and its arguments.
    """
    forward: Any = type(layer).forward
    code = getattr(forward, "__code__", None)
    if code is None or _NAME not in code.co_names or _NAME not in forward.__globals__:
        return
    names = {**forward.__globals__, _NAME: partial(attention, forward.__globals__[_NAME])}
    copy = FunctionType(code, names, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    setattr(copy, COPY_OF, forward)
    layer.__dict__["forward"] = MethodType(copy, layer)
