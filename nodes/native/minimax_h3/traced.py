"""MiniMax H3 on the meta device, where tensors have no values: for these, core's code reads some of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.minimax import model as core
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class TracedForward:
    """Core's `_forward` on the meta device, without the few values that it reads of its arguments."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(
        self,
        x: Any,
        timestep: Tensor,
        context: Tensor,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
        minimax_payload: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        payload = dict(minimax_payload or {})
        tags = payload.get("text_token_tags")
        if tags is not None:
            payload["text_token_tags"] = torch.zeros(tags.shape, dtype=tags.dtype)
        # Between the ends of the schedule all kinds of segments have a time step of their own.
        halfway = torch.full(timestep.shape, 500.0)
        with _AssignmentByMask():
            return core.MiniMaxH3Model._forward(
                self._model, x, halfway, context, transformer_options, minimax_payload=payload, **kwargs
            )


def refined_text_shape(width: int, text_states: Tensor) -> Tensor:
    """Zeros (1, L, width) in the shape of core's refined text."""
    return text_states.new_zeros(1, text_states.shape[1], width)


class _AssignmentByMask(TorchDispatchMode):
    """Skips assignments by a mask on the meta device, which has no values to count; they allocate next to nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index_put_.default and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
