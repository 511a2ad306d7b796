"""A fitted model: its runs are planned, told to core, kept within the plan, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...i2v_core.errors import DoesNotFitError, RanOutError
from ...i2v_core.memory.device import empty_allocator_cache
from ...i2v_core.units import format_gib
from .attention_memory import TAKING_WHAT_IS_FREE
from .call_plan import CallPlan
from .call_planner import CallPlanner, UntraceableError
from .call_shapes import Call, first_tensor
from .calls import CallState
from .compiling import uncompiled
from .held_weights import HeldWeightsRunner
from .host_memory import CallNeeds, batching_for, loading_for
from .model import NativeModel, Patch
from .planned_call import PlannedCall
from .quantised_layers import scales_whole_input
from .recorded_call import RecordedCall
from .run_record import RunRecord
from .services import Services
from .suggested_size import LatentClip

logger = logging.getLogger(__name__)

OVERRIDE = "optimized_attention_override"
"""Core's name for another node's attention, among a model's options."""
_PREFIX = "diffusion_model."


class FittedModel:
    """One fitted model: what its runs are planned from, the wrappers around them, and the patch around its calls.

    Args:
        native: the file that knows the model.
        base: core's `BaseModel`.
        device: where the model runs.
    """

    def __init__(self, native: NativeModel, base: Any, device: torch.device, services: Services) -> None:
        self.state = CallState(check_cancelled=services.check_cancelled)
        self.base, self.services = base, services
        self.model: nn.Module = base.diffusion_model
        """The diffusion model; torch.compile puts another in its place in `base` during a call."""
        self.patched: dict[str, Any] = {}
        self.left_out: list[str] = []
        """Patches whose place another node has taken."""
        self.not_cores_own: list[str] = []
        """Blocks of other classes than core's, counted."""
        self.plan: CallPlan | None = None
        """Plan of one guidance branch, while and after a sampler runs."""
        self._native = native
        self._planner = CallPlanner(native, base, device)
        self._plans: dict[object, CallPlan] = {}
        self._calls: dict[object, Call] = {}
        self._needs: CallNeeds | None = None
        self._usable_bytes: int | None = None
        self._record = RunRecord(services.free_bytes)
        self._clip = LatentClip(())
        self._mask: torch.Tensor | None = None
        self._learned_as, self._predictable = "", True

    def __str__(self) -> str:
        parts = [f"{self._native.name}: {len(self.patched)} layers run within the budget"]
        for reason, names in (
            ("another node has replaced them", self.left_out),
            ("their class is not core's own", self.not_cores_own),
        ):
            if names:
                parts.append(f"run as they are, since {reason}: {', '.join(names)}")
        whole = sum(map(scales_whole_input, self.model.modules()))
        if whole:
            parts.append(f"{whole} linear layers run unchunked, since their format takes one scale from all tokens")
        return "; ".join([*parts, "planned when sampling starts"])

    @property
    def wrappers(self) -> Mapping[str, Callable[..., Any]]:
        """Wrappers by core's name for the call that each goes around, in the order in which core makes the calls."""
        return {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREPARE_SAMPLING: self.prepare_sampling,
            WrappersMP.CALC_COND_BATCH: self.calc_cond_batch,
        }

    @property
    def call_patch(self) -> Patch:
        """Replacement for the method in which the diffusion model does its work, inside of other nodes' wrappers.

        A wrapper would not do: core calls one model's wrappers for its copies on other cards too, and for the second
        model of a guider.
        """
        method = "_forward" if hasattr(type(self.model), "_forward") else "forward"
        return Patch("", self.model, PlannedCall(self, getattr(type(self.model), method)), method)

    def outer_sample(self, executor: Any, noise: Any, latent_image: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole run of a sampler."""
        self.plan, self._plans, self._calls, self._needs, self._usable_bytes = None, {}, {}, None, None
        self._record = RunRecord(self.services.free_bytes)
        self._mask = kwargs.get("denoise_mask", args[2] if len(args) > 2 else None)
        self._clip = LatentClip(tuple(map(tuple, kwargs.get("latent_shapes") or (noise.shape,))))
        try:
            return executor(noise, latent_image, *args, **kwargs)
        finally:
            self._mask = None
            if self.plan is not None:
                self._finish(self.plan)

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Plans the run, and tells core what it needs."""
        self.services.check_latent(self._clip.shapes[0])
        self._look_at(model, kwargs.get("model_options") or model.model_options)
        calls = self._planner.recorded(self._clip, conds, self._mask)
        if not calls:
            return executor(model, noise_shape, conds, *args, **kwargs)
        try:
            self._needs = self._planned(calls, conds)
        except UntraceableError as error:
            self._note(f"runs unchunked: the memory of its calls cannot be predicted ({error})")
            return executor(model, noise_shape, conds, *args, **kwargs)
        with loading_for(model.model, self._needs):
            return executor(model, noise_shape, conds, *args, **kwargs)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x_in: torch.Tensor, timestep: Any, model_options: Any
    ) -> Any:
        """Lets core run guidance branches together where they fit, and looks for memory that was spilled."""
        warning = self._record.begin_step()
        if warning is not None:
            self._take_less(warning)
        if self.plan is None or model is not self.base:
            return executor(model, conds, x_in, timestep, model_options)
        needs = self._needs or CallNeeds({tuple(x_in.shape): self.plan.needed_bytes})
        with batching_for(model, needs, most_bytes=self.plan.usable_bytes - self.plan.resident_bytes):
            return executor(model, conds, x_in, timestep, model_options)

    @uncompiled
    def prepare(self, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Sets the layers up for a call of the diffusion model."""
        call = Call(self.model, (x, *args), kwargs)
        self.state.dtype = call.dtype
        self.state.runner = HeldWeightsRunner(first_tensor(x).device, call.dtype)
        try:
            self.state.workspace_bytes = self._plan_of(call).workspace_bytes
        except UntraceableError:
            self.state.workspace_bytes = None
        return call

    def measured(self, call: Call, device: torch.device) -> AbstractContextManager[None]:
        """Measures a call that `prepare` has set the layers up for."""
        plan = self._plans.get(call.key)
        return nullcontext() if plan is None else self._record.call(call.key, plan, device)

    # Planning.

    def _look_at(self, patcher: Any, model_options: Mapping[str, Any]) -> None:
        """Takes note of what the memory of calls depends on besides the model: attention, and patched weights."""
        override = model_options.get("transformer_options", {}).get(OVERRIDE)
        patched = {name.removeprefix(_PREFIX) for name in patcher.patches}
        self._planner.look_at(
            replaced_attention=override is not None,
            patched=patched,
            object_patches=patcher.object_patches,
            model_options=model_options,
        )
        chosen = attention.optimized_attention if override is None else override
        name = getattr(chosen, "__name__", type(chosen).__name__)
        model = type(self.model).__name__
        self._learned_as = f"{model}, {self.base.get_dtype_inference()}, {name}"
        self._predictable = name not in TAKING_WHAT_IS_FREE
        self._planner.facts = self.services.device_facts(self._learned_as)

    def _planned(self, calls: Sequence[RecordedCall], conds: Mapping[str, Any]) -> CallNeeds:
        """Plans the largest branch, and calls of several by the same cut; what all of them need."""
        largest = max((it for it in calls if it.branches == 1), key=lambda it: it.call.input_bytes)
        usable_bytes = self._usable()
        plan = self._planner.plan(largest.call, usable_bytes)
        if plan is None:
            raise self._planner.refusal(largest.call, usable_bytes, self._clip, conds, self._mask)
        self.plan = plan
        needed: dict[tuple[int, ...], int] = {}
        for it in calls:
            planned = plan
            if it.input_shape != largest.input_shape:
                peak = self._planner.peak(it.call)
                planned = replace(plan, peak_bytes=peak(plan.workspace_bytes), stock_bytes=peak(None))
            # Branches of one size differ in the length of their text alone, and need no more than the largest.
            self._plans[it.call.key], self._calls[it.call.key] = planned, it.call
            needed[it.input_shape] = max(needed.get(it.input_shape, 0), planned.needed_bytes)
        self._tell(str(plan))
        return CallNeeds(needed)

    def _plan_of(self, call: Call) -> CallPlan:
        """The plan for calls of these shapes; made with the first of them where it was not foreseen."""
        if call.key not in self._plans:
            found = self._planner.plan(call, self._usable())
            if found is None:
                needed = self._planner.lowest_needed_bytes(call)
                raise DoesNotFitError(
                    f"a call of {self._native.name} needs {format_gib(needed)} even with the lowest-memory settings, "
                    "which is more than can be used",
                    "use a smaller size or fewer frames, or a larger budget",
                )
            self._plans[call.key], self._calls[call.key] = found, call
            if self.plan is None:
                self.plan = found
                self._tell(str(found))
        return self._plans[call.key]

    def _usable(self) -> int:
        """Memory that calls and weights of this run may take, as it was before weights were loaded."""
        if self._usable_bytes is None:
            self._usable_bytes = self.services.usable_bytes()
        return self._usable_bytes

    # What goes wrong, and the end.

    def fall_back(self, call: Call, problem: str, device: torch.device) -> None:
        """Plans calls of these shapes finer, after one ran out of memory."""
        plan = self._plans.get(call.key)
        lower = None if plan is None else self._planner.finer(call, plan)
        if lower is None:
            raise RanOutError(
                f"the device ran out of memory in a call of {self._native.name}, even with the lowest-memory settings "
                f"({problem})",
                "free device memory, or use a smaller size or fewer frames",
            )
        empty_allocator_cache(device)
        assert lower.workspace_bytes is not None
        self._note(f"ran out of memory: the same step again in chunks of {format_gib(lower.workspace_bytes)} a layer")
        self._plans[call.key] = lower
        self.state.workspace_bytes = lower.workspace_bytes

    def _take_less(self, warning: str) -> None:
        """Plans all calls finer, after the driver has put device memory into the host's."""
        self._note(warning)
        for key, call in self._calls.items():
            self._plans[key] = self._planner.finer(call, self._plans[key]) or self._plans[key]

    def _note(self, note: str) -> None:
        logger.warning("%s: %s", self._native.name, note)
        self._record.notes.append(note)
        self._tell(note)

    def _finish(self, plan: CallPlan) -> None:
        """Reports a run, and learns from it."""
        self._tell(self._record.text(plan))
        if self._predictable:
            for predicted_bytes, measured_bytes in self._record.predicted_and_measured():
                self.services.learn(self._learned_as, self._planner.facts, predicted_bytes, measured_bytes)
        report = self._record.report(self._clip.shapes[0])
        if report is not None:
            self.services.keep_report(report)

    def _tell(self, line: str) -> None:
        logger.info("VRAM Fit, %s: %s", self._native.name, line)
        self.services.say(line)
