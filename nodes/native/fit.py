"""Fitting a model of core's into a budget: patches on a clone of its patcher, and wrappers around its calls.

Everything goes through what core offers for it: object patches, wrappers and callbacks of a `ModelPatcher`. The model,
its weights and core's modules stay as they are; without the clone, core's own run is the same to the bit.
"""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import CallbacksMP
from torch import nn

from .fitted_model import FittedModel
from .model import Patch, native_model
from .services import Services

KEY = "i2v_vram_fit"
"""Key of this pack's wrappers and callbacks among those of other nodes."""


def fitted(patcher: Any, services: Services) -> tuple[Any, str]:
    """A clone of the patcher whose model runs within the budget, and a line that says what it covers."""
    clone = patcher.clone()
    return clone, _attach(clone, services)


def _attach(patcher: Any, services: Services) -> str:
    _detach(patcher)
    model: nn.Module = patcher.model.diffusion_model
    native = native_model(model)
    if native is None:
        return f"{type(model).__name__} is not known to VRAM Fit: it runs as it is"
    fit = FittedModel(native, patcher.model, services)
    for patch in native.patches(model, fit.state):
        name = f"diffusion_model.{patch.name}"
        if _is_free(patcher, name, patch):
            patcher.add_object_patch(name, patch.replacement)
            fit.patched[name] = patch.replacement
        else:
            fit.left_out.append(patch.name.removesuffix(".forward"))
    for kind, wrapper in fit.wrappers.items():
        patcher.add_wrapper_with_key(kind, KEY, wrapper)
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _on_clone)
    patcher.set_attachments(KEY, fit)
    return str(fit)


def _on_clone(_original: Any, clone: Any) -> None:
    """Fits a clone that has got another model (torch.compile, several cards): its patches would run the first one."""
    fit: FittedModel | None = clone.get_attachment(KEY)
    if fit is not None and clone.model is not fit.base:
        _attach(clone, fit.services)


def _detach(patcher: Any) -> None:
    """Takes back what an earlier fit has put on this patcher."""
    fit: FittedModel | None = patcher.get_attachment(KEY)
    if fit is None:
        return
    for name, replacement in fit.patched.items():
        if patcher.object_patches.get(name) is replacement:
            del patcher.object_patches[name]
    for kind in fit.wrappers:
        patcher.remove_wrappers_with_key(kind, KEY)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    patcher.remove_attachments(KEY)


def _is_free(patcher: Any, name: str, patch: Patch) -> bool:
    """Whether a part runs core's own method, or one that a fit has put in: not another node's."""
    if name in patcher.object_patches:
        return False
    now = patch.module.__dict__.get(patch.method)
    before = patcher.object_patches_backup.get(name, now)
    ours = type(before) is type(patch.replacement)
    return ours or before is None or getattr(before, "__func__", None) is getattr(type(patch.module), patch.method)
