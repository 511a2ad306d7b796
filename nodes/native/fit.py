"""Fitting a model of core's into a budget: patches on a clone of its patcher, and wrappers around its calls.

Everything goes through what core offers for it: object patches, wrappers and callbacks of a `ModelPatcher`. The model,
its weights and core's modules stay as they are; without the clone, core's own run is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from comfy.patcher_extension import CallbacksMP
from torch import nn

from .fitted_model import FittedModel
from .model import Patch, is_own, native_model
from .resume import resumable
from .services import Services

KEY = "i2v_vram_fit"
"""Key of this pack's wrappers and callbacks among those of other nodes."""
_CLONED = ("ON_CLONE", "ON_MATCH_MULTIGPU_CLONES")
"""Names of core's callbacks for a clone that may have got another model; some versions give it that one later."""


def fitted(patcher: Any, services: Services) -> tuple[Any, str]:
    """A clone of the patcher whose model runs within the budget, and a line that says what it covers."""
    clone = patcher.clone()
    services = resumable(clone, services)
    return clone, _attach(clone, services)


def _attach(patcher: Any, services: Services) -> str:
    _detach(patcher)
    model: nn.Module = patcher.model.diffusion_model
    native = native_model(model)
    if native is None:
        return f"{type(model).__name__} is not known to VRAM Fit: it runs as it is"
    fit = FittedModel(native, patcher.model, patcher.load_device, services)
    if not _is_free(patcher, fit.call_patch):
        return f"{native.name}: another node has replaced the model's forward, so it runs as it is"
    patches = list(native.patches(model, fit.state))
    fit.not_cores_own.extend(_without_patch(model, native.block_lists(model), patches))
    for patch in (fit.call_patch, *patches):
        if _is_free(patcher, patch):
            patcher.add_object_patch(_name(patch), patch.replacement)
            fit.patched[_name(patch)] = patch.replacement
        else:
            fit.left_out.append(patch.name.removesuffix(".forward"))
    for kind, wrapper in fit.wrappers.items():
        patcher.add_wrapper_with_key(kind, KEY, wrapper)
    for kind in _callbacks():
        patcher.add_callback_with_key(kind, KEY, _on_clone)
    patcher.set_attachments(KEY, fit)
    return str(fit)


def _callbacks() -> list[str]:
    return [getattr(CallbacksMP, name) for name in _CLONED if hasattr(CallbacksMP, name)]


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
    for kind in _callbacks():
        patcher.remove_callbacks_with_key(kind, KEY)
    patcher.remove_attachments(KEY)


def _without_patch(model: nn.Module, block_lists: Sequence[str], patches: Sequence[Patch]) -> Iterator[str]:
    """Counts, for each list, the blocks that have no patch in them, where there are some; core's own have one."""
    if any(not patch.path and patch.method.startswith(("forward", "_forward")) for patch in patches):
        return  # of the whole model, and its blocks with it
    patched = {".".join(patch.path.split(".")[: path.count(".") + 2]) for path in block_lists for patch in patches}
    for path in block_lists:
        names = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
        if count := sum(name not in patched for name in names):
            yield f"{count} of {len(names)} {path}"


def _name(patch: Patch) -> str:
    """Path of a patch below core's `BaseModel`."""
    return f"diffusion_model.{patch.name}"


def _is_free(patcher: Any, patch: Patch) -> bool:
    """Whether a part runs core's own method, or one that a fit has put in: not another node's."""
    name = _name(patch)
    if name in patcher.object_patches:
        return False
    now = patch.module.__dict__.get(patch.method)
    before = patcher.object_patches_backup.get(name, now)
    return type(before) is type(patch.replacement) or is_own(before, patch.module, patch.method)
