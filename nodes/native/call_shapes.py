"""The shapes of a call of a diffusion model, which decide the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ...i2v_core.memory.meter import tensors_in

_NOT_OF_SHAPES = ("transformer_options", "control", "seed")
"""Arguments, and their entries, that change no shape: other nodes act through the first two."""
_NUMBERS = ("fps", "audio_inject_scale")
"""Arguments whose value core looks at, which some of its versions hand over as tensors."""
_PATCHES = ("attn1_patch", "attn2_patch", "attn1_output_patch", "double_block", "single_block")
"""Names of other nodes' patches that a block may be run differently for."""
_WITH_VALUES = ("denoise_mask",)
"""Small arguments whose values decide how many tokens a call has."""
DISTINCT_TIMESTEPS = "i2v_distinct_timesteps"
"""Key among the transformer options of a traced call: how many distinct time steps its tokens have."""


class Call:
    """The shapes of one call of a diffusion model: its arguments on the meta device.

    Other nodes' patches are in it as ones that change nothing: a block may need more memory for their sake.

    Args:
        model: the diffusion model.
        args, kwargs: as core's `DIFFUSION_MODEL` wrappers see them, which are the arguments of the model's `_forward`.
    """

    def __init__(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        bound = signature(type(model)._forward).bind(model, *args, **kwargs)
        bound.apply_defaults()
        _model, first, *rest = bound.args
        self.dtype: torch.dtype = first_tensor(first).dtype
        named = dict(zip(list(bound.signature.parameters)[2:], rest, strict=False)) | bound.kwargs
        self.first = _described(first)
        self.arguments: dict[str, Any] = {
            name: _argument(name, it) for name, it in named.items() if name not in _NOT_OF_SHAPES
        }
        self._distinct_timesteps = _distinct(named.get("timestep"))
        options = named.get("transformer_options") or {}
        self._patches = {name: len(them) for name, them in options.get("patches", {}).items() if name in _PATCHES}
        self._replaced_blocks = tuple(options.get("patches_replace", {}).get("dit", {}))

    @property
    def kwargs(self) -> dict[str, Any]:
        options = {
            # As samplers give them. Their values are looked at, so they are on the CPU.
            "sigmas": torch.ones(1),
            "sample_sigmas": torch.tensor([1.0, 0.0]),
            DISTINCT_TIMESTEPS: self._distinct_timesteps,
            "patches": {name: [_unchanged] * count for name, count in self._patches.items()},
            "patches_replace": {"dit": dict.fromkeys(self._replaced_blocks, _original_block)},
        }
        return {**self.arguments, "transformer_options": options}

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for calls of the same shapes."""
        named = sorted((name, repr(_key(it))) for name, it in self.arguments.items())
        patches = (*sorted(self._patches.items()), self._replaced_blocks)
        return (_key(self.first), self._distinct_timesteps, *named, *patches)

    @property
    def input_bytes(self) -> int:
        """Size of all arguments."""
        return sum(it.nbytes for it in tensors_in((self.first, self.arguments)))


def _unchanged(first: Any, *rest: Any, **named: Any) -> Any:
    """Returns what another node's patch is given, in each of the ways in which core calls patches."""
    if isinstance(first, dict):
        return first if "img" in first else first["x"]
    if named:
        return {}
    return first if len(rest) < 2 else (first, *rest[:-1])


def _original_block(arguments: Any, more: Any) -> Any:
    """Runs the block that another node has replaced."""
    return more["original_block"](arguments)


def _distinct(timesteps: Any) -> int | None:
    """Number of distinct time steps (B, tokens, ...) the tokens of a call have; None where all have the same."""
    if not isinstance(timesteps, Tensor) or timesteps.ndim < 2:
        return None
    return timesteps.flatten(1).unique(dim=1).shape[1]


def first_tensor(value: Any) -> Tensor:
    """The latents of a call, or the first of its several kinds."""
    return value[0] if isinstance(value, (list, tuple)) else value


def _argument(name: str, value: Any) -> Any:
    """An argument without its values, but those that a trace needs, which are in host memory."""
    if name in _WITH_VALUES and isinstance(value, Tensor):
        return value.detach().cpu()
    if name in _NUMBERS and isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return _described(value)


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
        values = None if value.is_meta else hash(value.float().numpy().tobytes())
        return (tuple(value.shape), value.dtype, values)
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple(sorted((name, _key(it)) for name, it in value.items()))
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value)
