"""A fitted model: its runs are planned, told to core, kept within the plan, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy.ldm.modules import attention
from comfy.patcher_extension import WrappersMP

from ...i2v_core.errors import DoesNotFitError, RanOutError
from ...i2v_core.memory.device import DeviceFacts, empty_allocator_cache, is_out_of_memory
from ...i2v_core.sampling.checkpoint import Checkpointing
from ...i2v_core.units import format_gib
from .attention_memory import TAKING_WHAT_IS_FREE
from .call_plan import UNKNOWN_DEVICE, CallPlan
from .call_planner import CallPlanner, UntraceableError
from .calls import CallState
from .held_weights import HeldWeightsRunner
from .host_memory import CallNeeds, batching_for, loading_for
from .model import NativeModel
from .recorded_call import RecordedCall
from .run_record import RunRecord
from .suggested_size import LatentClip
from .twin import Call

logger = logging.getLogger(__name__)

OVERRIDE = "optimized_attention_override"
"""Core's name for another node's attention, among a model's options."""
_PREFIX = "diffusion_model."


def _no_learning(_model: str, _facts: DeviceFacts, _predicted_bytes: int, _measured_bytes: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Services that the host's side provides to a fit."""

    usable_bytes: Callable[[], int]
    """Device memory that the model may take now: the budget, or what is free or can be freed."""
    check_cancelled: Callable[[], None]
    """Raises when the user has cancelled."""
    say: Callable[[str], None] = lambda _: None
    """Shows a line to the user."""
    free_bytes: Callable[[], int | None] = lambda: None
    """Device memory that nobody holds; None where that is not known."""
    device_facts: Callable[[str], DeviceFacts] = lambda _: UNKNOWN_DEVICE
    """The device, with what earlier runs of a model took of their predictions."""
    learn: Callable[[str, DeviceFacts, int, int], None] = _no_learning
    """Keeps a model's predicted and measured peak in bytes for later runs."""
    keep_report: Callable[[Mapping[str, Any]], None] = lambda _: None
    """Takes the report of a run, as `run_report.StageFigures` reads it."""
    checkpointing: Checkpointing | None = None
    """Where and when a run's calls are recorded, to resume it; None: never."""
    is_whole: Callable[[str], bool] = lambda _: False
    """Whether a prompt, by the host's name of it, has been run to its end."""


class FittedModel:
    """One fitted model: what its runs are planned from, and the wrappers around them.

    Args:
        native: the file that knows the model.
        base: core's `BaseModel`.
        device: where the model runs.
    """

    def __init__(self, native: NativeModel, base: Any, device: torch.device, services: Services) -> None:
        self.state = CallState(on_chunk=services.check_cancelled)
        self.base, self.services = base, services
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
        return "; ".join([*parts, "planned when sampling starts"])

    @property
    def wrappers(self) -> Mapping[str, Callable[..., Any]]:
        """Wrappers by core's name for the call that each goes around, in the order in which core makes the calls."""
        return {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREPARE_SAMPLING: self.prepare_sampling,
            WrappersMP.CALC_COND_BATCH: self.calc_cond_batch,
            WrappersMP.DIFFUSION_MODEL: self.diffusion_model,
        }

    def outer_sample(self, executor: Any, noise: Any, latent_image: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole run of a sampler."""
        self.plan, self._plans, self._calls, self._needs, self._usable_bytes = None, {}, {}, None, None
        self._record = RunRecord(self.services.free_bytes)
        self._mask = kwargs.get("denoise_mask", args[2] if len(args) > 2 else None)
        self._clip = LatentClip(tuple(map(tuple, kwargs.get("latent_shapes") or (noise.shape,))))
        try:
            return executor(noise, latent_image, *args, **kwargs)
        finally:
            self.state.workspace_bytes = None
            self.state.runner = HeldWeightsRunner(torch.device("cpu"), torch.float32)
            if self.plan is not None:
                self._finish(self.plan)

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Plans the run, and tells core what it needs."""
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
        if self.plan is None:
            return executor(model, conds, x_in, timestep, model_options)
        needs = self._needs or CallNeeds({tuple(x_in.shape): self.plan.needed_bytes})
        with batching_for(model, needs, most_bytes=self.plan.usable_bytes - self.plan.resident_bytes):
            return executor(model, conds, x_in, timestep, model_options)

    def diffusion_model(self, executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the model; after an out-of-memory the same call again, cut finer."""
        first = x[0] if isinstance(x, (list, tuple)) else x
        call = Call(executor.class_obj, (x, *args), kwargs)
        self.state.dtype = first.dtype
        self.state.runner = HeldWeightsRunner(first.device, first.dtype)
        while True:
            try:
                plan = self._plan_of(call)
            except UntraceableError:
                self.state.workspace_bytes = None
                return executor(x, *args, **kwargs)
            self.state.workspace_bytes = plan.workspace_bytes
            try:
                with self._record.call(call.key, plan, first.device):
                    return executor(x, *args, **kwargs)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            # Outside of the except: the traceback keeps what the failed layer had made.
            self._fall_back(call, problem, first.device)

    # Planning.

    def _look_at(self, patcher: Any, model_options: Mapping[str, Any]) -> None:
        """Takes note of what the memory of calls depends on besides the model: attention, and patched weights."""
        override = model_options.get("transformer_options", {}).get(OVERRIDE)
        patched = {name.removeprefix(_PREFIX) for name in patcher.patches}
        self._planner.look_at(replaced_attention=override is not None, patched=patched)
        chosen = attention.optimized_attention if override is None else override
        name = getattr(chosen, "__name__", type(chosen).__name__)
        model = type(self.base.diffusion_model).__name__
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

    def _fall_back(self, call: Call, problem: str, device: torch.device) -> None:
        """Plans calls of these shapes finer, after one ran out of memory."""
        lower = self._planner.finer(call, self._plans[call.key])
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
