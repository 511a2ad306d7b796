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

from .twin import Call, Twin

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
    twin: Twin,
    denoise_mask: torch.Tensor | None = None,
    latent_shapes: Sequence[Sequence[int]] | None = None,
) -> list[Call]:
    """The calls, one of each shape, that the conditioning leads to; one guidance branch each.

    Args:
        model: core's `BaseModel`.
        latent_shape: of the latent to sample.
        conds: as a guider holds them, by name.
        twin: the diffusion model's; it stands in for parts of the model that core runs to prepare the call.
        denoise_mask: of the latent, if it has one.
        latent_shapes: of the parts of a latent that is packed from several.
    """
    probe = _probe(model, twin)
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
    processed = {name: it.process_cond(batch_size=noise.shape[0], area=None) for name, it in model_conds.items()}
    arguments = comfy.samplers.cond_cat([processed])
    sigma = torch.full((noise.shape[0],), float(probe.model_sampling.sigma_max))
    try:
        probe.apply_model(noise, sigma, transformer_options={}, **arguments)
    except _RecordedError as recorded:
        return recorded.call
    raise AssertionError("core ran the call without the diffusion model")


def _probe(model: Any, twin: Twin) -> Any:
    """The model with a diffusion model that records its arguments; the original is not changed."""
    probe, diffusion_model = copy.copy(model), copy.copy(model.diffusion_model)

    def record(*args: Any, **kwargs: Any) -> None:
        raise _RecordedError(Call(model.diffusion_model, args, kwargs))

    diffusion_model.forward = record
    if hasattr(diffusion_model, "preprocess_text_embeds"):
        diffusion_model.preprocess_text_embeds = twin.preprocess_text_embeds
    probe.__dict__["_modules"] = {**model._modules, "diffusion_model": diffusion_model}
    return probe
