"""Predictions and plans of a model's calls, each shape of call traced once a workspace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any

import comfy.model_management as management
import torch
from torch import Tensor, nn

from ...i2v_core.errors import DoesNotFitError
from ...i2v_core.memory.device import DeviceFacts
from ...i2v_core.units import format_gib
from .attention_memory import attention_output, replaced_attention_output
from .call_plan import UNKNOWN_DEVICE, CallPlan, Peak, finer, lowest_needed_bytes, plan_call
from .call_shapes import Call
from .model import NativeModel
from .recorded_call import FAILURES, RecordedCall, recorded_calls
from .suggested_size import LatentClip, suggested_sizes
from .twin import Twin

logger = logging.getLogger(__name__)


class UntraceableError(Exception):
    """A call whose memory cannot be traced: its layers do on meta tensors what only real ones allow."""


class CallPlanner:
    """Plans the calls of one model.

    Args:
        native: the file that knows the model.
        base: core's `BaseModel`.
        device: where the model runs.
    """

    def __init__(self, native: NativeModel, base: Any, device: torch.device) -> None:
        self.facts: DeviceFacts = UNKNOWN_DEVICE
        """The device, with what earlier runs took of their predictions."""
        self._native, self._base, self._device = native, base, device
        self._model: nn.Module = base.diffusion_model
        self._object_patches: Mapping[str, Any] = {}
        self._model_options: Mapping[str, Any] = {}
        self._attention: Callable[..., Tensor] = attention_output
        self._patched: Collection[str] = ()
        self._streams_patched = False
        self._twins: dict[object, Twin] = {}
        self._peaks: dict[object, Peak] = {}

    def look_at(
        self,
        *,
        replaced_attention: bool,
        patched: Collection[str],
        object_patches: Mapping[str, Any] | None = None,
        model_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take note of what the memory of calls depends on besides the model, before a run.

        Args:
            replaced_attention: whether attention is another node's.
            patched: names of weights of the diffusion model that LoRA and others change.
            object_patches: of the patcher.
            model_options: of the run.
        """
        self._object_patches, self._model_options = object_patches or {}, model_options or {}
        self._attention = replaced_attention_output if replaced_attention else attention_output
        self._patched = patched

    def recorded(self, clip: LatentClip, conds: Mapping[str, Any], mask: Tensor | None) -> list[RecordedCall]:
        """The calls to come; none where core's preparation cannot be followed, and the first call is planned for.

        Args:
            conds: as a guider holds them, by name.
            mask: core's `denoise_mask`.
        """
        shapes = list(clip.shapes)
        try:
            return recorded_calls(
                self._base,
                clip.shape,
                conds,
                object_patches=self._object_patches,
                model_options=self._model_options,
                denoise_mask=mask,
                latent_shapes=shapes,
            )
        except FAILURES as error:
            logger.info("VRAM Fit plans with the first call: its shapes are not known before (%r)", error)
            return []

    def plan(self, call: Call, usable_bytes: int) -> CallPlan | None:
        """The plan of calls of these shapes; None if nothing fits. Raises `UntraceableError`.

        Weights that all stay on the device are patched once, when they are loaded; others whenever they are used.
        """
        self._streams_patched = False
        plan = self._plan(call, usable_bytes)
        if self._patched and (plan is None or not plan.holds_all_weights):
            self._streams_patched = True
            plan = self._plan(call, usable_bytes)
        return plan

    def _plan(self, call: Call, usable_bytes: int) -> CallPlan | None:
        return plan_call(
            self.peak(call),
            usable_bytes=usable_bytes,
            weights_bytes=self.weights_bytes,
            held_bytes=self._held_bytes,
            device=self.facts,
        )

    def finer(self, call: Call, plan: CallPlan) -> CallPlan | None:
        """The next plan that takes less; None where there is none."""
        return finer(plan, self.peak(call))

    def lowest_needed_bytes(self, call: Call) -> int:
        """Device memory without which no call of these shapes runs: the finest cut, and the widest layer's weights."""
        return lowest_needed_bytes(self.peak(call), self.facts) + self._held_bytes

    def refusal(
        self, call: Call, usable_bytes: int, clip: LatentClip, conds: Mapping[str, Any], mask: Tensor | None
    ) -> DoesNotFitError:
        """The error for a run that does not fit, with the nearest that would."""
        needed = self.lowest_needed_bytes(call)

        def fits(other: LatentClip) -> bool:
            found = self.recorded(other, conds, None if mask is None else _mask_for(mask, other))
            single = (it.call for it in found if it.branches == 1)
            try:
                return max(map(self.lowest_needed_bytes, single), default=needed) <= usable_bytes
            except UntraceableError:  # the conditioning was made for the clip that was asked for
                return False

        sizes = suggested_sizes(self._base.latent_format, clip, fits)
        return DoesNotFitError(
            f"{sizes.asked} with {self._native.name} does not fit: a call needs {format_gib(needed)} even with the "
            f"lowest-memory settings, and {format_gib(usable_bytes)} can be used",
            sizes.remedy(needed),
        )

    def peak(self, call: Call) -> Peak:
        """The traced peak of calls of these shapes, by workspace."""
        twin = self._twin(call.dtype)
        if (twin, call.key) not in self._peaks:
            self._peaks[twin, call.key] = lru_cache(maxsize=64)(partial(_traced, twin, call))
        return self._peaks[twin, call.key]

    def _twin(self, dtype: torch.dtype) -> Twin:
        """The model's shape, with attention and patches as they are now."""
        patched = frozenset(self._patched) if self._streams_patched else frozenset[str]()
        key = (self._attention, patched, dtype)
        if key not in self._twins:
            self._twins[key] = Twin(
                self._native,
                self._model,
                dtype,
                device=self._device,
                attention=self._attention,
                patched=patched,
            )
        return self._twins[key]

    @property
    def weights_bytes(self) -> int:
        """The model's weights as they are stored."""
        return management.module_size(self._model)

    @property
    def _held_bytes(self) -> int:
        """Weights that the widest layer call has on the device, as they are stored: two linear layers at most."""
        model: Any = self._model
        in_blocks = _widest(block for path in self._native.block_lists(model) for block in model.get_submodule(path))
        return max(2 * in_blocks, _widest([model]))


def _traced(twin: Twin, call: Call, workspace_bytes: int | None) -> int:
    try:
        return twin.peak_bytes(call, workspace_bytes)
    except FAILURES as error:
        raise UntraceableError(repr(error)) from error


def _mask_for(mask: Tensor, clip: LatentClip) -> Tensor:
    """A mask for another clip, of the nearest values; axes of one stay so."""
    mask = mask.cpu()
    for axis, size in enumerate(clip.shape[2:], 2):
        if mask.shape[axis] > 1:
            mask = mask.index_select(axis, torch.arange(size) * mask.shape[axis] // size)
    return mask


def _widest(modules: Iterable[nn.Module]) -> int:
    """Bytes of the largest weight."""
    return max((it.nbytes for module in modules for it in module.parameters()), default=0)
