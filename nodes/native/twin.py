"""The memory of a model's call, traced on a twin without weights: the same classes on the meta device, two blocks deep.

Blocks run one after another and leave nothing behind but the hidden state, so two have the peak of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import comfy.ops
import torch
from torch import Tensor, nn

from ...i2v_core.chunking import DistinctChunks
from ...i2v_core.memory.meter import StorageMeter
from .calls import CallState
from .model import NativeModel

_BLOCKS = 2
_NOT_OF_SHAPES = ("transformer_options", "control", "seed")
"""Arguments, and their entries, that change no shape: other nodes act through the first two."""


class Twin:
    """A model's shape, for tracing its calls.

    Args:
        native: the file that knows the model.
        model: the diffusion model; it is not changed.
        dtype: the precision in which it computes.
    """

    def __init__(self, native: NativeModel, model: nn.Module, dtype: torch.dtype) -> None:
        self._state = CallState(runner=DistinctChunks())
        self.model = on_meta(model, native.block_lists(model), dtype)
        for patch in native.patches(self.model, self._state):
            setattr(patch.module, patch.method, patch.replacement)

    def peak_bytes(self, call: Call, workspace_bytes: int | None) -> int:
        """The highest sum of live activations during a call; weights and the call's inputs do not count."""
        self._state.workspace_bytes = workspace_bytes
        self._state.dtype = call.dtype
        with torch.no_grad(), StorageMeter(device_type="meta") as meter:
            result = self.model(call.first, **call.kwargs)
            del result
        return meter.peak_bytes

    def preprocess_text_embeds(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros in the shape of what some models make of a text once, before they are called."""
        model: Any = self.model
        made = model.preprocess_text_embeds(*_described(args), **_described(kwargs))
        return torch.zeros(made.shape, dtype=made.dtype)


class Call:
    """The shapes of one call of a diffusion model: its arguments on the meta device, without other nodes' patches."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = signature(type(model).forward).bind(model, *args, **kwargs)
        bound.apply_defaults()
        _model, first, *rest = bound.args
        self.dtype: torch.dtype = _first_tensor(first).dtype
        named = dict(zip(list(bound.signature.parameters)[2:], rest, strict=False)) | bound.kwargs
        self.first = _described(first)
        self.arguments: dict[str, Any] = _described(named)

    @property
    def kwargs(self) -> dict[str, Any]:
        options = {
            "optimized_attention_override": _attention_output,
            # As samplers give them. Their values are looked at, so they are on the CPU.
            "sigmas": torch.ones(1),
            "sample_sigmas": torch.tensor([1.0, 0.0]),
        }
        return {**self.arguments, "transformer_options": options}

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for calls of the same shapes."""
        return (_key(self.first), *sorted((name, repr(_key(it))) for name, it in self.arguments.items()))


def _first_tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, (list, tuple)) else value


def _described(value: Any) -> Any:
    """A value whose tensors are on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_described, value))
    if isinstance(value, dict):
        return {name: _described(it) for name, it in value.items() if name not in _NOT_OF_SHAPES}
    return value


def _key(value: Any) -> object:
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple(sorted((name, _key(it)) for name, it in value.items()))
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value)


def _attention_output(_func: Any, q: Tensor, *_args: Any, **kwargs: Any) -> Tensor:
    """Allocates as a fused attention kernel does: its output alone, in core's layout."""
    if not kwargs.get("skip_reshape"):
        return torch.empty_like(q)
    batch, heads, tokens, width = q.shape
    shape = (batch, heads, tokens, width) if kwargs.get("skip_output_reshape") else (batch, tokens, heads * width)
    return q.new_empty(shape)


def on_meta(model: nn.Module, block_lists: tuple[str, ...], dtype: torch.dtype) -> nn.Module:
    """A copy of the model with two blocks of each list, whose weights have a shape and nothing else."""
    shortened = {id(model.get_submodule(path)) for path in block_lists}
    return _copied(model, dtype, shortened, {})


def _copied(module: nn.Module, dtype: torch.dtype, shortened: set[int], memo: dict[int, nn.Module]) -> nn.Module:
    """The module with its own dictionaries; what is neither a tensor nor a module is shared with the original."""
    if id(module) in memo:
        return memo[id(module)]
    twin: nn.Module = object.__new__(_plain_class(module) or type(module))
    memo[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    children = list(module._modules.items())
    if id(module) in shortened:
        children = children[:_BLOCKS]
    twin.__dict__["_modules"] = {
        name: None if child is None else _copied(child, dtype, shortened, memo) for name, child in children
    }
    shape = getattr(module, "_orig_shape", None)  # of a weight that is packed
    twin.__dict__["_parameters"] = {
        name: None if it is None else _parameter(it, shape if name == "weight" else None, dtype)
        for name, it in module._parameters.items()
    }
    twin.__dict__["_buffers"] = {
        name: None if it is None else torch.empty(it.shape, dtype=it.dtype, device="meta")
        for name, it in module._buffers.items()
    }
    for name in [
        name for name in twin.__dict__ if name in ("_v", "_prefetch") or callable(getattr(type(twin), name, None))
    ]:
        del twin.__dict__[name]  # another model's loading, and methods that are replaced in the instance
    if isinstance(twin, comfy.ops.CastWeightBiasOp):
        twin.__dict__.update(comfy_cast_weights=False, weight_function=[], bias_function=[])
    return twin


def _parameter(tensor: Tensor, shape: tuple[int, ...] | None, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of the same shape, in the precision of computation unless it is kept in fp32."""
    wanted = tensor.dtype if tensor.dtype == torch.float32 else dtype
    return nn.Parameter(torch.empty(shape or tuple(tensor.shape), dtype=wanted, device="meta"), requires_grad=False)


def _plain_class(module: nn.Module) -> type[nn.Module] | None:
    """Core's layer class without casts, for a layer of any of core's sets of operations."""
    if not isinstance(module, comfy.ops.CastWeightBiasOp):
        return None
    return getattr(comfy.ops.disable_weight_init, type(module).__name__, None)
