"""The calls that a sampler will make of a model: their shapes, before weights are loaded.

Core's own code prepares them, from the latent and the conditioning to the diffusion model's arguments, and stops where
the diffusion model would run. It runs on the meta device, or on the CPU where it looks at values; everything until
there is as small as a latent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from .call_shapes import Call
from .model import PreparesConditioning, native_model

FAILURES = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError)
"""Errors of core's preparation of a call in surroundings that are not a run's."""
_DEVICES = (torch.device("meta"), torch.device("cpu"))
_NOT_OF_SHAPES = (
    "mask",
    "control",
    "hooks",
    "gligen",
    "timestep_start",
    "timestep_end",
    "start_percent",
    "end_percent",
)
"""Entries of a conditioning that leave the shapes of its calls alone, or turn it off for a part of the steps."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call, of one guidance branch or of several that core can join."""

    call: Call
    input_shape: tuple[int, ...]
    """Shape of the latents of all its branches, as core passes it to its estimate of memory."""
    branches: int


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
) -> list[RecordedCall]:
    """The calls, one of each shape, that the conditioning leads to: of each branch alone, and of all alike together.

    Args:
        model: core's `BaseModel`.
        latent_shape: of the latent to sample.
        conds: as a guider holds them, by name.
        object_patches: of the patcher, which core puts into the model when it is loaded.
        model_options: of the run; core's context windows are among them.
        denoise_mask: of the latent, if it has one.
        latent_shapes: of the parts of a latent that is packed from several.

    Raises:
        FAILURES: core's preparation cannot be followed.
    """
    probe, options = _probe(model, object_patches or {}), model_options or {}
    on_meta, on_cpu = _DEVICES
    try:
        return _recorded_on(on_meta, probe, options, latent_shape, conds, denoise_mask, latent_shapes)
    except FAILURES:  # a model's preparation looks at values
        return _recorded_on(on_cpu, probe, options, latent_shape, conds, denoise_mask, latent_shapes)


def _recorded_on(
    device: torch.device,
    probe: Any,
    model_options: Mapping[str, Any],
    latent_shape: Sequence[int],
    conds: Mapping[str, Sequence[Mapping[str, Any]]],
    denoise_mask: torch.Tensor | None,
    latent_shapes: Sequence[Sequence[int]] | None,
) -> list[RecordedCall]:
    noise = torch.zeros(tuple(latent_shape), device=device)
    prepared = comfy.samplers.process_conds(
        probe,
        noise,
        {name: [_shapes_only(entry) for entry in entries] for name, entries in conds.items()},
        device,
        latent_image=noise,
        denoise_mask=None if denoise_mask is None else denoise_mask.to(device),
        seed=0,
        latent_shapes=latent_shapes,
    )
    sigma = torch.full((noise.shape[0],), float(probe.model_sampling.sigma_max), device=device)
    of_other_nodes = model_options.get("transformer_options", {})
    patches = {name: of_other_nodes.get(name, {}) for name in ("patches", "patches_replace")}
    found: dict[object, RecordedCall] = {}
    for latents, parts in _windows(probe, list(prepared.values()), noise, model_options.get("context_handler")):
        branches = [
            comfy.samplers.get_area_and_mult(_shapes_only(entry), latents, sigma)
            for entries in parts
            for entry in entries
        ]
        for group in _groups(branches):
            recorded = _recorded(probe, group, sigma, patches)
            found.setdefault(recorded.call.key, recorded)
    return list(found.values())


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


def _shapes_only(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in _NOT_OF_SHAPES}


def _groups(branches: Sequence[Any]) -> Iterator[list[Any]]:
    """Each branch alone, and then those that core can join, together."""
    yield from ([branch] for branch in branches)
    left = list(branches)
    while left:
        alike = [it for it in left if comfy.samplers.can_concat_cond(it, left[0])]
        left = [it for it in left if not any(it is other for other in alike)]
        if len(alike) > 1:
            yield alike


def _recorded(probe: Any, branches: Sequence[Any], sigma: torch.Tensor, patches: Mapping[str, Any]) -> RecordedCall:
    def record(executor: Any, *args: Any, **kwargs: Any) -> None:
        raise _RecordedError(Call(executor.class_obj, args, kwargs))

    options = {**patches, "wrappers": {WrappersMP.DIFFUSION_MODEL: {"record": [record]}}}
    latents = torch.cat([it.input_x for it in branches])
    arguments = comfy.samplers.cond_cat([it.conditioning for it in branches])
    try:
        probe.apply_model(latents, torch.cat([sigma] * len(branches)), transformer_options=options, **arguments)
    except _RecordedError as recorded:
        return RecordedCall(recorded.call, tuple(latents.shape), len(branches))
    raise AssertionError("core ran the call without the diffusion model")


def _probe(model: Any, object_patches: Mapping[str, Any]) -> Any:
    """The patched model, with stand-ins for work that its preparation would do; the original is not changed."""
    probe, diffusion_model = copy.copy(model), copy.copy(model.diffusion_model)
    native = native_model(model.diffusion_model)
    if isinstance(native, PreparesConditioning):
        diffusion_model.__dict__.update(native.stand_ins(model.diffusion_model))
    probe.__dict__["_modules"] = {**model._modules, "diffusion_model": diffusion_model}
    for name, value in object_patches.items():
        if "." not in name and name != "diffusion_model":
            setattr(probe, name, value)
    return probe
