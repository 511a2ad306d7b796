"""Names of precisions, as users write them."""

from __future__ import annotations

import torch

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AUTO = "auto"
_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


def precision_name(dtype: torch.dtype) -> str:
    return _NAMES[dtype]
