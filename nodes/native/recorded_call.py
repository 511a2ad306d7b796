"""The first call that a sampler will make of a model: its shapes, before weights are loaded.

Core's own code prepares the call, from the latent and the conditioning to the diffusion model's arguments. It runs on
the CPU and stops where the diffusion model would run; everything until there is as small as a latent.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from .model import PreparesConditioning, native_model
from .twin import Call

_CPU = torch.device("cpu")


class _RecordedError(Exception):
    """Carries the arguments out of core's code."""

    def __init__(self, call: Call) -> None:
        super().__init__("the diffusion model's arguments are known")
        self.call = call


def recorded_calls(
    model: Any,
    latent_shape: Sequence[int],
    conds: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    denoise_mask: torch.Tensor | None = None,
    latent_shapes: Sequence[Sequence[int]] | None = None,
) -> list[Call]:
    """The calls, one of each shape, that the conditioning leads to; one guidance branch each.

    Args:
        model: core's `BaseModel`.
        latent_shape: of the latent to sample.
        conds: as a guider holds them, by name.
        denoise_mask: of the latent, if it has one.
        latent_shapes: of the parts of a latent that is packed from several.
    """
    probe = _probe(model)
    noise = torch.zeros(tuple(latent_shape))
    more: dict[str, Any] = {"latent_image": noise, "denoise_mask": denoise_mask, "seed": 0}
    if latent_shapes is not None:
        more["latent_shapes"] = latent_shapes
    calls: dict[object, Call] = {}
    for name, entries in conds.items():
        encoded = comfy.samplers.encode_model_conds(
            probe.extra_conds, [dict(entry) for entry in entries], noise, _CPU, name, **more
        )
        for entry in encoded:
            call = _recorded(probe, noise, entry["model_conds"])
            calls[call.key] = call
    return list(calls.values())


def _recorded(probe: Any, noise: torch.Tensor, model_conds: Mapping[str, Any]) -> Call:
    def record(executor: Any, *args: Any, **kwargs: Any) -> None:
        raise _RecordedError(Call(executor.class_obj, args, kwargs))

    processed = {name: it.process_cond(batch_size=noise.shape[0], area=None) for name, it in model_conds.items()}
    arguments = comfy.samplers.cond_cat([processed])
    sigma = torch.full((noise.shape[0],), float(probe.model_sampling.sigma_max))
    options = {"wrappers": {WrappersMP.DIFFUSION_MODEL: {"record": [record]}}}
    try:
        probe.apply_model(noise, sigma, transformer_options=options, **arguments)
    except _RecordedError as recorded:
        return recorded.call
    raise AssertionError("core ran the call without the diffusion model")


def _probe(model: Any) -> Any:
    """The model, with stand-ins for work that its preparation would do; the original is not changed."""
    native = native_model(model.diffusion_model)
    if not isinstance(native, PreparesConditioning):
        return model
    probe, diffusion_model = copy.copy(model), copy.copy(model.diffusion_model)
    diffusion_model.__dict__.update(native.stand_ins(model.diffusion_model))
    probe.__dict__["_modules"] = {**model._modules, "diffusion_model": diffusion_model}
    return probe
