"""A fitted model: its runs are planned, told to core, kept within the plan, and reported."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import comfy.model_management as management
import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...i2v_core.errors import DoesNotFitError, RanOutError
from ...i2v_core.memory.device import is_out_of_memory
from ...i2v_core.units import format_gib
from .call_plan import CallPlan, Peak, finer, lowest_needed_bytes, plan_call
from .calls import CallState
from .held_weights import HeldWeightsRunner
from .host_memory import estimating_shape, memory_required_as
from .measured import PeakReading
from .model import NativeModel, Patch
from .quantised_layers import scales_whole_input
from .recorded_call import recorded_calls
from .suggested_size import suggested_sizes
from .twin import Call, Twin

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Services that the host's side provides to a fit."""

    usable_bytes: Callable[[], int]
    """Device memory that the model may take now: the budget, or what is free or can be freed."""
    check_cancelled: Callable[[], None]
    """Raises when the user has cancelled."""
    say: Callable[[str], None] = lambda _: None
    """Shows a line to the user."""


@dataclass(frozen=True, slots=True)
class _Run:
    """The inputs of a run of a sampler that tell its calls' shapes."""

    latent_shape: Sequence[int]
    conds: Mapping[str, Any]
    object_patches: Mapping[str, Any]
    model_options: Mapping[str, Any]


class FittedModel:
    """One fitted model: what its runs are planned from, the wrappers around them, and the patch around its calls."""

    def __init__(self, native: NativeModel, base: Any, services: Services) -> None:
        self.state = CallState(check_cancelled=services.check_cancelled)
        self.base, self.services = base, services
        self.model: nn.Module = base.diffusion_model
        """The diffusion model; torch.compile puts another in its place in `base` during a call."""
        self.patched: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._native = native
        self._twins: dict[torch.dtype, Twin] = {}
        self.plan: CallPlan | None = None
        """Plan of one guidance branch, while and after a sampler runs."""
        self._plans: dict[object, CallPlan] = {}
        self._peaks: dict[object, Peak] = {}
        self.reading = PeakReading()
        self._fallbacks: list[str] = []
        self._mask: torch.Tensor | None = None
        self._latent_shape: Sequence[int] = ()
        self._latent_shapes: Any = None

    def __str__(self) -> str:
        lines = [f"{self._native.name}: {len(self.patched)} layers run within the budget"]
        if self.left_out:
            lines.append(f"run as they are, since another node has replaced them: {', '.join(self.left_out)}")
        whole = sum(map(scales_whole_input, self.model.modules()))
        if whole:
            lines.append(f"{whole} linear layers run unchunked, since their format takes one scale from all tokens")
        return "; ".join([*lines, "planned when sampling starts"])

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
        return Patch("", self.model, _PlannedCall(self, getattr(type(self.model), method)), method)

    def outer_sample(self, executor: Any, noise: Any, latent_image: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole run of a sampler."""
        self.plan, self._plans = None, {}
        self.reading, self._fallbacks = PeakReading(), []
        self._mask = kwargs.get("denoise_mask", args[2] if len(args) > 2 else None)
        self._latent_shape, self._latent_shapes = tuple(noise.shape), kwargs.get("latent_shapes")
        try:
            return executor(noise, latent_image, *args, **kwargs)
        finally:
            self._mask, self._latent_shape = None, ()
            if self.plan is not None:
                self._tell(self._report(self.plan))

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Plans the run, and tells core what it needs."""
        # Core's context windows name the shape of a window here.
        run = _Run(self._latent_shape or noise_shape, conds, model.object_patches, kwargs.get("model_options") or {})
        calls = self._recorded(run)
        if not calls:
            return executor(model, noise_shape, conds, *args, **kwargs)
        call = max(calls, key=lambda it: self._peak(it)(None))
        plan = self._planned(call, run)
        shape = estimating_shape(model, noise_shape, conds, plan.needed_bytes)
        return executor(model, shape, conds, *args, **kwargs)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x_in: torch.Tensor, timestep: Any, model_options: Any
    ) -> Any:
        """Lets core run both guidance branches together where they fit."""
        plan = self.plan
        if plan is None or model is not self.base:
            return executor(model, conds, x_in, timestep, model_options)
        with memory_required_as(
            model,
            plan.needed_bytes,
            branch_size=x_in.shape[0],
            most_bytes=plan.usable_bytes - plan.resident_bytes,
        ):
            return executor(model, conds, x_in, timestep, model_options)

    @torch.compiler.disable
    def prepare(self, x: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Sets the layers up for a call of the diffusion model."""
        call = Call(self.model, (x, *args), kwargs)
        self.state.dtype = call.dtype
        self.state.runner = HeldWeightsRunner(_first(x).device, call.dtype)
        self.state.workspace_bytes = self._plan_of(call).workspace_bytes
        return call

    # Planning.

    def _recorded(self, run: _Run) -> list[Call]:
        """The calls to come; none where core's preparation cannot be followed, and the first call is planned for."""
        try:
            return recorded_calls(
                self.base,
                run.latent_shape,
                run.conds,
                object_patches=run.object_patches,
                model_options=run.model_options,
                denoise_mask=self._mask,
                latent_shapes=self._latent_shapes,
            )
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            logger.info("VRAM Fit plans with the first call: its shapes are not known before (%r)", error)
            return []

    def _planned(self, call: Call, run: _Run) -> CallPlan:
        usable_bytes = self.services.usable_bytes()
        plan = self._find(call, usable_bytes)
        if plan is None:
            needed = self._lowest_needed_bytes(call)

            def fits(shape: Sequence[int]) -> bool:
                others = self._recorded(replace(run, latent_shape=shape))
                return max(map(self._lowest_needed_bytes, others), default=needed) <= usable_bytes

            sizes = suggested_sizes(self.base.latent_format, run.latent_shape, fits)
            raise DoesNotFitError(
                f"{sizes.asked} with {self._native.name} does not fit: a call needs {format_gib(needed)} even with the "
                f"lowest-memory settings, and {format_gib(usable_bytes)} can be used",
                sizes.remedy(needed),
            )
        self.plan = self._plans[call.key] = plan
        self._tell(str(plan))
        return plan

    def _plan_of(self, call: Call) -> CallPlan:
        """The plan for calls of these shapes; made with the first of them where it was not foreseen."""
        if call.key not in self._plans:
            found = self._find(call, self.services.usable_bytes())
            if found is None:
                needed = self._lowest_needed_bytes(call)
                raise DoesNotFitError(
                    f"a call of {self._native.name} needs {format_gib(needed)} even with the lowest-memory settings, "
                    "which is more than can be used",
                    "use a smaller size or fewer frames, or a larger budget",
                )
            self._plans[call.key] = found
            if self.plan is None:
                self.plan = found
                self._tell(str(found))
        return self._plans[call.key]

    def _find(self, call: Call, usable_bytes: int) -> CallPlan | None:
        return plan_call(
            self._peak(call),
            usable_bytes=usable_bytes,
            weights_bytes=management.module_size(self.model),
            held_bytes=self._held_bytes(call),
        )

    def _lowest_needed_bytes(self, call: Call) -> int:
        """Device memory without which no call of these shapes runs: the finest cut, and the widest layer's weights."""
        return lowest_needed_bytes(self._peak(call)) + self._held_bytes(call)

    def _peak(self, call: Call) -> Peak:
        if call.dtype not in self._twins:
            self._twins[call.dtype] = Twin(self._native, self.model, call.dtype)
        twin = self._twins[call.dtype]
        if call.key not in self._peaks:
            self._peaks[call.key] = lru_cache(maxsize=64)(
                lambda workspace_bytes: twin.peak_bytes(call, workspace_bytes)
            )
        return self._peaks[call.key]

    def _held_bytes(self, call: Call) -> int:
        """Weights that the widest layer call holds: two linear layers at most, in the precision of computation."""
        blocks = (it for path in self._native.block_lists(self.model) for it in self.model.get_submodule(path))
        return call.dtype.itemsize * max(2 * _widest(blocks), _widest([self.model]))

    def fall_back(self, call: Call, problem: str, device: torch.device) -> None:
        """Plans calls of these shapes finer, after one ran out of memory."""
        lower = finer(self._plans[call.key], self._peak(call))
        if lower is None:
            raise RanOutError(
                f"the device ran out of memory in a call of {self._native.name}, even with the lowest-memory settings "
                f"({problem})",
                "free device memory, or use a smaller size or fewer frames",
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
        assert lower.workspace_bytes is not None
        note = f"ran out of memory: the same step again in chunks of {format_gib(lower.workspace_bytes)} a layer"
        logger.warning("%s: %s", self._native.name, note)
        self._fallbacks.append(note)
        self._tell(note)
        self._plans[call.key] = lower
        self.state.workspace_bytes = lower.workspace_bytes

    def _report(self, plan: CallPlan) -> str:
        measured = self.reading.peak_bytes
        beside = "" if measured is None else f", measured {format_gib(measured)}"
        lines = [f"sampled: predicted {format_gib(plan.peak_bytes)} of activations a call{beside}", str(plan)]
        return "\n".join([*lines, *self._fallbacks])

    def _tell(self, line: str) -> None:
        logger.info("VRAM Fit, %s: %s", self._native.name, line)
        self.services.say(line)


class _PlannedCall:
    """A diffusion model's own forward in chunks as planned; after an out-of-memory the same call again, cut finer."""

    def __init__(self, fit: FittedModel, forward: Callable[..., Any]) -> None:
        self._fit, self._forward = fit, forward

    @partial(torch.compiler.disable, recursive=False)  # it compiles what this calls, but not the planning
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        fit, device = self._fit, _first(x).device
        call = fit.prepare(x, args, kwargs)
        try:
            while True:
                try:
                    with fit.reading.around(device):
                        return self._forward(fit.model, x, *args, **kwargs)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    problem = str(error)
                # Outside of the except: the traceback keeps what the failed layer had made.
                fit.fall_back(call, problem, device)
        finally:
            fit.state.workspace_bytes = None


def _first(x: Any) -> torch.Tensor:
    return x[0] if isinstance(x, (list, tuple)) else x


def _widest(modules: Iterable[nn.Module]) -> int:
    """Numbers in the largest weight, once it is dequantised: a packed weight shows their shape."""
    return max((math.prod(it.shape) for module in modules for it in module.parameters()), default=0)
