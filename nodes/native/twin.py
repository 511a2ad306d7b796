"""The memory of a model's call, traced on a twin without weights: the same classes on the meta device, two blocks deep.

Blocks run one after another and leave nothing behind but the hidden state, so two have the peak of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from inspect import signature
from typing import Any

import comfy.ops
import comfy.quant_ops
import torch
from torch import Tensor, nn

from ...i2v_core.chunking import DistinctChunks
from ...i2v_core.memory.meter import tensors_in
from .attention_memory import attention_output
from .calls import CallState
from .held_weights import HeldWeightsRunner
from .kernel_memory import kernels_traced
from .model import NativeModel
from .traced_attention import trace_attention

_BLOCKS = 2
_CPU = torch.device("cpu")
_NOT_OF_SHAPES = ("transformer_options", "control", "seed")
"""Arguments, and their entries, that change no shape: other nodes act through the first two."""
_NUMBERS = ("fps", "audio_inject_scale")
"""Arguments whose value core looks at, which some of its versions hand over as tensors."""


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
        self._state = CallState(
            runner=_TwinRunner(torch.device("meta"), dtype),
            attention_options={"optimized_attention_override": attention},
        )
        self._device = device
        self._attention = attention
        self.model = _on_meta(model, native.block_lists(model), patched)
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
        kwargs["transformer_options"]["optimized_attention_override"] = self._attention
        with torch.no_grad(), kernels_traced(self._device) as meter:
            result = self.model(call.first, **kwargs)
            del result
        return meter.peak_bytes

    def preprocess_text_embeds(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros in the shape of what some models make of a text once, before they are called."""
        model: Any = self.model
        made = model.preprocess_text_embeds(*_described(args), **_described(kwargs))
        (device, *_) = (it.device for it in tensors_in((args, kwargs)))
        return torch.zeros(made.shape, dtype=made.dtype, device=device)


class Call:
    """The shapes of one call of a diffusion model: its arguments on the meta device, without other nodes' patches."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = signature(type(model).forward).bind(model, *args, **kwargs)
        bound.apply_defaults()
        _model, first, *rest = bound.args
        self.dtype: torch.dtype = _first_tensor(first).dtype
        named = dict(zip(list(bound.signature.parameters)[2:], rest, strict=False)) | bound.kwargs
        self.first = _described(first)
        self.arguments: dict[str, Any] = {
            name: it.item() if name in _NUMBERS and isinstance(it, Tensor) and it.numel() == 1 else _described(it)
            for name, it in named.items()
            if name not in _NOT_OF_SHAPES
        }

    @property
    def kwargs(self) -> dict[str, Any]:
        options = {
            "optimized_attention_override": attention_output,
            # As samplers give them. Their values are looked at, so they are on the CPU.
            "sigmas": torch.ones(1),
            "sample_sigmas": torch.tensor([1.0, 0.0]),
        }
        return {**self.arguments, "transformer_options": options}

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for calls of the same shapes."""
        return (_key(self.first), *sorted((name, repr(_key(it))) for name, it in self.arguments.items()))

    @property
    def input_bytes(self) -> int:
        """Size of all arguments."""
        return sum(it.nbytes for it in tensors_in((self.first, self.arguments)))


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


class _TwinRunner(HeldWeightsRunner, DistinctChunks):
    """Holds the weights of each layer call as a run does, and skips chunks that need the memory of one that ran."""


def _on_meta(model: nn.Module, block_lists: tuple[str, ...], patched: Collection[str]) -> nn.Module:
    """A copy of the model with two blocks of each list, whose weights have a shape and a format and nothing else."""
    shortened = {id(model.get_submodule(path)) for path in block_lists}
    return _copied(model, "", shortened, patched, {})


def _copied(
    module: nn.Module, path: str, shortened: set[int], patched: Collection[str], memo: dict[int, nn.Module]
) -> nn.Module:
    """The module with its own dictionaries; what is neither a tensor nor a module is shared with the original."""
    if id(module) in memo:
        return memo[id(module)]
    packed = _is_packed(module)
    twin: nn.Module = object.__new__(_casting_class(module) if packed else type(module))
    memo[id(module)] = twin
    twin.__dict__.update(module.__dict__)
    children = list(module._modules.items())
    if id(module) in shortened:
        children = children[:_BLOCKS]
    twin.__dict__["_modules"] = {
        name: None if child is None else _copied(child, f"{path}{name}.", shortened, patched, memo)
        for name, child in children
    }
    twin.__dict__["_parameters"] = {
        name: None if it is None else _parameter(it, packed=packed and name == "weight")
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
        functions = [_dequantised] if packed else []
        functions += [_with_lora] if f"{path}weight" in patched else []
        twin.__dict__.update(weight_function=functions, bias_function=[])
    return twin


def _is_packed(module: Any) -> bool:
    """Whether a layer's weight is in a format of another node's (GGUF), which core does not see."""
    return hasattr(module, "is_ggml_quantized") and bool(module.is_ggml_quantized())


def _parameter(tensor: Tensor, *, packed: bool) -> nn.Parameter:
    """A parameter of the same shape and format; one that is packed has numbers of 8 bits."""
    if packed:
        described = torch.empty(tuple(tensor.shape), dtype=torch.float8_e4m3fn, device="meta")
    elif isinstance(tensor, comfy.quant_ops.QuantizedTensor):
        described = tensor.detach().to("meta")
    else:
        described = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(described, requires_grad=False)


def _casting_class(module: nn.Module) -> type[nn.Module]:
    """Core's layer class that casts its weights, for a layer of another node's operations."""
    return getattr(comfy.ops.manual_cast, type(module).__name__)


def _dequantised(weight: Tensor) -> Tensor:
    """Allocates as ComfyUI-GGUF's K-quants do (`dequant.py`, 2026): integers, and their products with the scales."""
    parts = [torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)]
    del parts
    return weight


def _with_lora(weight: Tensor) -> Tensor:
    """Allocates as core's `calculate_weight` does: the product of a LoRA's matrices, and that times its strength."""
    parts = [torch.empty_like(weight), torch.empty_like(weight)]
    del parts
    return weight
