"""The memory of a model's call, traced on a twin without weights: the same classes on the meta device, two blocks deep.

Blocks run one after another and leave nothing behind but the hidden state, so two have the peak of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
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
_NOT_OF_SHAPES = ("transformer_options", "control")
"""Arguments through which other nodes act on a call."""
_WITH_VALUES = ("denoise_mask",)
"""Small arguments whose values decide how many tokens a call has."""
DISTINCT_TIMESTEPS = "i2v_distinct_timesteps"
"""Key among the transformer options of a traced call: how many distinct time steps its tokens have."""


class Twin:
    """A model's shape, for tracing its calls.

    Args:
        native: the file that knows the model.
        model: the diffusion model; it is not changed.
        dtype: the precision in which it computes.
    """

    def __init__(self, native: NativeModel, model: nn.Module, dtype: torch.dtype) -> None:
        self._state = CallState(runner=DistinctChunks())
        self.model: Any = on_meta(model, native.block_lists(model), dtype)
        for patch in native.patches(self.model, self._state):
            setattr(patch.module, patch.method, patch.replacement)

    def peak_bytes(self, call: Call, workspace_bytes: int | None) -> int:
        """The highest sum of live activations during a call; weights and the call's inputs do not count."""
        self._state.workspace_bytes = workspace_bytes
        self._state.dtype = call.dtype
        with torch.no_grad(), StorageMeter(run=_run_on_shapes) as meter:
            result = self.model._forward(call.first, **call.kwargs)
            del result
        return meter.peak_bytes


class Call:
    """The shapes of one call of a diffusion model: its arguments on the meta device, without other nodes' patches.

    Args:
        model: the diffusion model.
        args, kwargs: as core's `DIFFUSION_MODEL` wrappers see them, which are the arguments of the model's `_forward`.
    """

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = signature(type(model)._forward).bind(model, *args, **kwargs)
        bound.apply_defaults()
        _model, first, *rest = bound.args
        self.dtype: torch.dtype = _first_tensor(first).dtype
        named = dict(zip(list(bound.signature.parameters)[2:], rest, strict=False)) | bound.kwargs
        self.first = _described(first)
        self.arguments = {
            name: _valued(it) if name in _WITH_VALUES else _described(it)
            for name, it in named.items()
            if name not in _NOT_OF_SHAPES
        }
        self._distinct_timesteps = _distinct(named.get("timestep"))

    @property
    def kwargs(self) -> dict[str, Any]:
        options = {
            "optimized_attention_override": _attention_output,
            DISTINCT_TIMESTEPS: self._distinct_timesteps,
        }
        return {**self.arguments, "transformer_options": options}

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for calls of the same shapes."""
        named = sorted((name, repr(_key(it))) for name, it in self.arguments.items())
        return (_key(self.first), self._distinct_timesteps, *named)


def _distinct(timesteps: Any) -> int | None:
    """How many distinct time steps (B, tokens, ...) the tokens of a call have; None where all have the same."""
    if not isinstance(timesteps, Tensor) or timesteps.ndim < 2:
        return None
    return timesteps.flatten(1).unique(dim=1).shape[1]


def _run_on_shapes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operation on tensors that have no values: a fraction that core reads back is 0.

    Reading a truth value or a whole number still fails, since those may decide shapes.
    """
    if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].is_floating_point():
        return 0.0
    return func(*args, **kwargs)


def _first_tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, (list, tuple)) else value


def _described(value: Any) -> Any:
    """A value whose tensors are on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_described, value))
    if isinstance(value, dict):
        return {name: _described(it) for name, it in value.items()}
    return value


def _valued(value: Any) -> Any:
    """A tensor with its values, in host memory: a trace can select tokens with it."""
    return value.detach().cpu() if isinstance(value, Tensor) else _described(value)


def _key(value: Any) -> object:
    if isinstance(value, Tensor):
        values = None if value.is_meta else hash(value.float().numpy().tobytes())
        return (tuple(value.shape), value.dtype, values)
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
