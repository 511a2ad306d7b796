"""Precisions: their names, and the parts of a model that keep a higher one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AUTO = "auto"
_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


def precision_name(dtype: torch.dtype) -> str:
    """Return the name that users know a precision by."""
    return _NAMES[dtype]


def compute_dtypes(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], torch.dtype]:
    """Return a function that gives the dtype of each parameter and buffer of a module that runs in `dtype`.

    That is fp32 for tensors that diffusers keeps in fp32, such as some models' position embeddings, time embeddings and
    norms, and their own dtype for integers.
    """
    from diffusers.models.modeling_utils import ModelMixin

    kept: set[Tensor] = set()
    if isinstance(module, ModelMixin):
        parts = set(getattr(module, "_keep_in_fp32_modules", None) or ())
        named = (*module.named_parameters(), *module.named_buffers())
        kept = {tensor for name, tensor in named if parts.intersection(name.split("."))}

    def of(tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if tensor in kept else dtype

    return of
