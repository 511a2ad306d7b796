"""Whether an autoencoder is made of core's own layers, as core wrote them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..model import is_own_method

_TORCH_LAYERS = (nn.Sequential, nn.ModuleList, nn.SiLU, nn.Dropout, nn.Identity, nn.Upsample, nn.ZeroPad2d)


def all_plain(model: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether every module is exactly of one of core's classes, or a plain one of PyTorch's, and not altered."""
    return all(type(it) in (*classes, *_TORCH_LAYERS) and _is_unaltered(it) for it in model.modules())


def _is_unaltered(module: Any) -> bool:
    """Whether no node has replaced a method, or has made a convolution's padding wrap around, as for seamless tiles."""
    methods = (it for it in ("forward", "_conv_forward", "encode", "decode") if hasattr(type(module), it))
    return all(is_own_method(module, it) for it in methods) and getattr(module, "padding_mode", "zeros") == "zeros"
