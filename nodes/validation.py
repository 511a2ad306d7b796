"""Validation of a node's inputs against its own schema when it runs.

The host checks widget values in a prompt, but neither values that come from another node, nor values that a prompt has
in place of a link. Those can be anything, and the error should say what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from comfy_api.latest import io
from torch import Tensor

from ..i2v_core.errors import BadInputError
from ..i2v_core.families import Conditioning, I2VModel
from ..i2v_core.planning.plan import Plan
from ..i2v_core.run_report import RunReport
from .sockets import I2VConditioningSocket, I2VModelSocket, I2VPlanSocket, I2VReportSocket

Execute = TypeVar("Execute", bound=Callable[..., io.NodeOutput])


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of input: how to test a value, its name in messages, and where to get such a value."""

    accepts: Callable[[Any], bool]
    name: str
    remedy: str


_SET_IT = "set it on the node, or connect a node that outputs one"

KINDS: Mapping[str, Kind] = {
    I2VModelSocket.io_type: Kind(lambda value: isinstance(value, I2VModel), "a model", "connect I2V Loader"),
    I2VPlanSocket.io_type: Kind(lambda value: isinstance(value, Plan), "a plan", "connect VRAM Budget"),
    I2VConditioningSocket.io_type: Kind(
        lambda value: isinstance(value, Conditioning), "conditioning of this pack", "connect I2V Encode"
    ),
    I2VReportSocket.io_type: Kind(
        lambda value: isinstance(value, RunReport), "a report", "connect VAE Tiled Decode or I2V Save Video"
    ),
    io.Latent.io_type: Kind(
        lambda value: isinstance(value, Mapping) and _is_pixels(value.get("samples")),
        "a latent",
        "connect Chunked Sampler or I2V Load Latent",
    ),
    io.Image.io_type: Kind(
        lambda value: _is_pixels(value) and value.ndim == 4 and value.numel() > 0,
        "an image of shape (frames, height, width, 3)",
        "connect a node that outputs an IMAGE",
    ),
    io.Model.io_type: Kind(
        lambda value: callable(getattr(value, "clone", None)) and hasattr(value, "model"),
        "a model of ComfyUI's",
        "connect one of its loaders, such as Load Diffusion Model, or a LoRA loader",
    ),
    io.Vae.io_type: Kind(
        lambda value: callable(getattr(value, "decode", None)), "a VAE of ComfyUI's", "connect Load VAE"
    ),
    io.Int.io_type: Kind(
        lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number", _SET_IT
    ),
    io.Float.io_type: Kind(
        lambda value: isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)),
        "a finite number",
        _SET_IT,
    ),
    io.Boolean.io_type: Kind(lambda value: isinstance(value, bool), "true or false", _SET_IT),
    io.String.io_type: Kind(lambda value: isinstance(value, str) and _is_encodable(value), "text", _SET_IT),
    io.Combo.io_type: Kind(lambda value: isinstance(value, str), "one of its options", _SET_IT),
}
"""Kinds by the host's name of the input type."""


def checked(execute: Execute) -> Execute:
    """Wrap a node's `execute` to raise `BadInputError` for values that its schema does not allow."""

    @wraps(execute)
    def run(cls: type[io.ComfyNode], **values: Any) -> io.NodeOutput:
        check_values(cls.define_schema().inputs, values)
        return execute(cls, **values)

    return run  # pyright: ignore[reportReturnType]


def check_values(specs: Iterable[io.Input], values: Mapping[str, Any]) -> None:
    """Raise `BadInputError` unless every input has a value that its schema allows; optional ones may be missing."""
    for spec in specs:
        value = values.get(spec.id)
        if value is not None or not spec.optional:
            _check(spec, value)


def _check(spec: io.Input, value: Any) -> None:
    kind = KINDS[spec.get_io_type()]
    if not kind.accepts(value):
        raise BadInputError(f"{spec.id} is {_describe(value)}, which is not {kind.name}", kind.remedy)
    options = getattr(spec, "options", None)
    if options is not None and value not in options:
        raise BadInputError(f"'{value}' is not a valid {spec.id}", f"choose one of {', '.join(options)}")
    least, most = getattr(spec, "min", None), getattr(spec, "max", None)
    if least is not None and not least <= value <= most:
        raise BadInputError(f"{spec.id} is {value}, which is out of range", f"use {least:,} to {most:,}")


def _is_pixels(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_encodable(text: str) -> bool:
    """Return whether the text has no lone surrogates, which JSON can hold but tokenizers cannot take."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _describe(value: Any) -> str:
    """Describe a value for a message: plain values as they are, others by their type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {str(value.dtype).removeprefix('torch.')}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"'{value}'" if isinstance(value, str) else f"of type {type(value).__name__}"
