"""A fitted model: its runs are planned, told to core, kept within the plan, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

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
from .model import NativeModel
from .recorded_call import recorded_calls
from .services import Services
from .suggested_size import suggested_sizes
from .twin import Call, Twin

logger = logging.getLogger(__name__)


class FittedModel:
    """One fitted model: what its runs are planned from, and the wrappers around them."""

    def __init__(self, native: NativeModel, base: Any, services: Services) -> None:
        self.state = CallState(on_chunk=services.check_cancelled)
        self.base, self.services = base, services
        self.patched: dict[str, Any] = {}
        self.left_out: list[str] = []
        self._native = native
        self.plan: CallPlan | None = None
        """Plan of one guidance branch, while and after a sampler runs."""
        self._plans: dict[object, CallPlan] = {}
        self._peaks: dict[object, Peak] = {}
        self._reading = PeakReading()
        self._fallbacks: list[str] = []
        self._usable_bytes: int | None = None
        self._mask: torch.Tensor | None = None
        self._latent_shapes: Any = None

    def __str__(self) -> str:
        left = f"; run as they are, since another node has replaced them: {', '.join(self.left_out)}"
        return (
            f"{self._native.name}: {len(self.patched)} layers run within the budget"
            f"{left if self.left_out else ''}; planned when sampling starts"
        )

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
        self.plan, self._plans, self._usable_bytes = None, {}, None
        self._reading, self._fallbacks = PeakReading(), []
        self._mask = kwargs.get("denoise_mask", args[2] if len(args) > 2 else None)
        self._latent_shapes = kwargs.get("latent_shapes")
        try:
            return executor(noise, latent_image, *args, **kwargs)
        finally:
            self.state.workspace_bytes = None
            self.state.runner = HeldWeightsRunner(torch.device("cpu"), torch.float32)
            if self.plan is not None:
                self._tell(self._report(self.plan))

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Sequence[int], conds: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Plans the run, and tells core what it needs."""
        self.services.check_latent(noise_shape)
        calls = self._recorded(noise_shape, conds)
        if not calls:
            return executor(model, noise_shape, conds, *args, **kwargs)
        call = max(calls, key=lambda it: self._peak(it)(None))
        plan = self._planned(call, noise_shape, conds)
        shape = estimating_shape(model, noise_shape, conds, plan.needed_bytes)
        return executor(model, shape, conds, *args, **kwargs)

    def calc_cond_batch(
        self, executor: Any, model: Any, conds: Any, x_in: torch.Tensor, timestep: Any, model_options: Any
    ) -> Any:
        """Lets core run both guidance branches together where they fit."""
        plan = self.plan
        if plan is None:
            return executor(model, conds, x_in, timestep, model_options)
        with memory_required_as(
            model,
            plan.needed_bytes,
            branch_size=x_in.shape[0],
            most_bytes=plan.usable_bytes - plan.resident_bytes,
        ):
            return executor(model, conds, x_in, timestep, model_options)

    def diffusion_model(self, executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """One call of the model; after an out-of-memory the same call again, cut finer."""
        first = x[0] if isinstance(x, (list, tuple)) else x
        call = Call(self.base.diffusion_model, (x, *args), kwargs)
        self.state.dtype = first.dtype
        self.state.runner = HeldWeightsRunner(first.device, first.dtype)
        while True:
            self.state.workspace_bytes = self._plan_of(call).workspace_bytes
            try:
                with self._reading.around(first.device):
                    return executor(x, *args, **kwargs)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            # Outside of the except: the traceback keeps what the failed layer had made.
            self._fall_back(call, problem, first.device)

    # Planning.

    def _recorded(self, noise_shape: Sequence[int], conds: Mapping[str, Any]) -> list[Call]:
        """The calls to come; none where core's preparation cannot be followed, and the first call is planned for."""
        try:
            return recorded_calls(
                self.base,
                noise_shape,
                conds,
                twin=self._twin,
                denoise_mask=self._mask,
                latent_shapes=self._latent_shapes,
            )
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
            logger.info("VRAM Fit plans with the first call: its shapes are not known before (%r)", error)
            return []

    def _planned(self, call: Call, noise_shape: Sequence[int], conds: Mapping[str, Any]) -> CallPlan:
        usable_bytes = self._usable()
        plan = self._find(call, usable_bytes)
        if plan is None:
            needed = self._lowest_needed_bytes(call)

            def fits(shape: Sequence[int]) -> bool:
                others = self._recorded(shape, conds)
                return max(map(self._lowest_needed_bytes, others), default=needed) <= usable_bytes

            sizes = suggested_sizes(self.base.latent_format, noise_shape, fits)
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
            found = self._find(call, self._usable())
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

    def _usable(self) -> int:
        """Memory that calls and weights of this run may take, as it was before weights were loaded."""
        if self._usable_bytes is None:
            self._usable_bytes = self.services.usable_bytes()
        return self._usable_bytes

    def _find(self, call: Call, usable_bytes: int) -> CallPlan | None:
        return plan_call(
            self._peak(call),
            usable_bytes=usable_bytes,
            weights_bytes=_weights_bytes(self.base),
            held_bytes=self._held_bytes,
        )

    def _lowest_needed_bytes(self, call: Call) -> int:
        """Device memory without which no call of these shapes runs: the finest cut, and the widest layer's weights."""
        return lowest_needed_bytes(self._peak(call)) + self._held_bytes

    @cached_property
    def _twin(self) -> Twin:
        return Twin(self._native, self.base.diffusion_model, self.base.get_dtype_inference())

    def _peak(self, call: Call) -> Peak:
        twin = self._twin
        if call.key not in self._peaks:
            self._peaks[call.key] = lru_cache(maxsize=64)(
                lambda workspace_bytes: twin.peak_bytes(call, workspace_bytes)
            )
        return self._peaks[call.key]

    @property
    def _held_bytes(self) -> int:
        """Weights that the widest layer call holds: two linear layers at most, in the precision of computation."""
        model, itemsize = self.base.diffusion_model, self.base.get_dtype_inference().itemsize
        in_blocks = _widest(block for path in self._native.block_lists(model) for block in model.get_submodule(path))
        return itemsize * max(2 * in_blocks, _widest([model]))

    def _fall_back(self, call: Call, problem: str, device: torch.device) -> None:
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

    def _report(self, plan: CallPlan) -> str:
        measured = self._reading.peak_bytes
        beside = "" if measured is None else f", measured {format_gib(measured)}"
        lines = [f"sampled: predicted {format_gib(plan.peak_bytes)} of activations a call{beside}", str(plan)]
        return "\n".join([*lines, *self._fallbacks])

    def _tell(self, line: str) -> None:
        logger.info("VRAM Fit, %s: %s", self._native.name, line)
        self.services.say(line)


def _widest(modules: Iterable[nn.Module]) -> int:
    """Numbers in the largest weight."""
    return max((it.numel() for module in modules for it in module.parameters()), default=0)


def _weights_bytes(base: Any) -> int:
    """Bytes of all weights as they are stored, quantised ones too."""
    return sum(it.nbytes for it in base.diffusion_model.parameters())
