"""The memory of a model's call, traced on a twin without weights: the same classes on the meta device, two blocks deep.

Blocks run one after another and leave nothing behind but the hidden state, so two have the peak of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from ...i2v_core.chunking import DistinctChunks
from .attention_memory import attention_output
from .call_shapes import Call
from .calls import CallState
from .held_weights import HeldWeightsRunner
from .kernel_memory import kernels_traced
from .meta_model import on_meta
from .model import NativeModel
from .traced_attention import trace_attention

_CPU = torch.device("cpu")


class Twin:
    """A model's shape, for tracing its calls.

    Args:
        native: the file that knows the model.
        model: the diffusion model; it is not changed.
        dtype: the precision in which it computes.
        device: where it runs.
        attention: core's `optimized_attention_override` for the trace.
        patched: names of weights that patches change at each use, as LoRA those that do not stay on the device.
    """

    def __init__(
        self,
        native: NativeModel,
        model: nn.Module,
        dtype: torch.dtype,
        *,
        device: torch.device = _CPU,
        attention: Callable[..., Tensor] = attention_output,
        patched: Collection[str] = (),
    ) -> None:
        self._attention = {"optimized_attention_override": attention}
        self._state = CallState(
            runner=_TwinRunner(torch.device("meta"), dtype), attention_options=dict(self._attention)
        )
        self._device = device
        self.model: Any = on_meta(model, native.block_lists(model), patched)
        for layer in self.model.modules():
            trace_attention(layer, attention)
        for patch in native.patches(self.model, self._state):
            setattr(patch.module, patch.method, patch.replacement)

    def peak_bytes(self, call: Call, workspace_bytes: int | None) -> int:
        """The highest sum of live activations during a call, with copies of weights that are made for a layer; neither
        weights as they are stored nor the call's inputs count.
        """
        self._state.workspace_bytes = workspace_bytes
        self._state.dtype = call.dtype
        kwargs = call.kwargs
        kwargs["transformer_options"].update(self._attention)
        with torch.no_grad(), kernels_traced(self._device) as meter:
            result = self.model._forward(call.first, **kwargs)
            del result
        return meter.peak_bytes


class _TwinRunner(HeldWeightsRunner, DistinctChunks):
    """Holds the weights of each layer call as a run does, and skips chunks that need the memory of one that ran."""
