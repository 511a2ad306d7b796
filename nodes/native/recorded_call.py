"""The first call that a sampler will make of a model: its shapes, before weights are loaded.

Core's own code prepares the call, from the latent and the conditioning to the diffusion model's arguments. It runs on
the CPU and stops where the diffusion model would run; everything until there is as small as a latent.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.samplers
import torch

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
    object_patches: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    denoise_mask: torch.Tensor | None = None,
    latent_shapes: Sequence[Sequence[int]] | None = None,
) -> list[Call]:
    """The calls, one of each shape, that the conditioning leads to; one guidance branch each.

    Args:
        model: core's `BaseModel`.
        latent_shape: of the latent to sample.
        conds: as a guider holds them, by name.
        object_patches: of the patcher, which core puts into the model when it is loaded.
        model_options: of the run; core's context windows are among them.
        denoise_mask: of the latent, if it has one.
        latent_shapes: of the parts of a latent that is packed from several.
    """
    probe = _probe(model, object_patches or {})
    noise = torch.zeros(tuple(latent_shape))
    more: dict[str, Any] = {"latent_image": noise, "denoise_mask": denoise_mask, "seed": 0}
    if latent_shapes is not None:
        more["latent_shapes"] = latent_shapes
    branches = [
        comfy.samplers.encode_model_conds(
            probe.extra_conds, [dict(entry) for entry in entries], noise, _CPU, name, **more
        )
        for name, entries in conds.items()
    ]
    options = model_options or {}
    of_other_nodes = options.get("transformer_options", {})
    patches = {name: of_other_nodes.get(name, {}) for name in ("patches", "patches_replace")}
    calls: dict[object, Call] = {}
    for window, parts in _windows(probe, branches, noise, options.get("context_handler")):
        for entry in itertools.chain(*parts):
            call = _recorded(probe, window, entry["model_conds"], patches)
            calls[call.key] = call
    return list(calls.values())


def _windows(
    probe: Any, branches: list[Any], noise: torch.Tensor, handler: Any
) -> list[tuple[torch.Tensor, list[Any]]]:
    """The latents that calls run on, with their conditioning: one, or a window of it each where core cuts it so."""
    sigmas = torch.tensor([float(probe.model_sampling.sigma_max), 0.0])
    sigma = sigmas[:1].expand(noise.shape[0])
    if handler is None or not handler.should_use_context(probe, branches, noise, sigma, {}):
        return [(noise, branches)]
    windows: list[tuple[torch.Tensor, list[Any]]] = []

    def record(_model: Any, parts: list[Any], window: torch.Tensor, *_args: Any) -> list[torch.Tensor]:
        windows.append((window, parts))
        return [torch.zeros_like(window) for _ in parts]

    options = {"transformer_options": {"sample_sigmas": sigmas}}
    copy.copy(handler).execute(record, probe, branches, noise, sigma, options)
    return windows


def _recorded(probe: Any, noise: torch.Tensor, model_conds: Mapping[str, Any], patches: dict[str, Any]) -> Call:
    processed = {name: it.process_cond(batch_size=noise.shape[0], area=None) for name, it in model_conds.items()}
    arguments = comfy.samplers.cond_cat([processed])
    sigma = torch.full((noise.shape[0],), float(probe.model_sampling.sigma_max))
    try:
        probe.apply_model(noise, sigma, transformer_options=patches, **arguments)
    except _RecordedError as recorded:
        return recorded.call
    raise AssertionError("core ran the call without the diffusion model")


def _probe(model: Any, object_patches: Mapping[str, Any]) -> Any:
    """The patched model with a diffusion model that records its arguments; the original is not changed."""
    probe, diffusion_model = copy.copy(model), copy.copy(model.diffusion_model)

    def record(*args: Any, **kwargs: Any) -> None:
        raise _RecordedError(Call(model.diffusion_model, args, kwargs))

    diffusion_model.forward = record
    probe.__dict__["_modules"] = {**model._modules, "diffusion_model": diffusion_model}
    for name, value in object_patches.items():
        if "." not in name and name != "diffusion_model":
            setattr(probe, name, value)
    return probe
