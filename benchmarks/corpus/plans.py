"""Plans of VRAM Fit for a model that is not there: its configuration, on meta tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_host.model_case import ModelCase, model_of, sampler_input

from .host import host_module, pack_module


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One guidance branch's call within a budget, as VRAM Fit would run it."""

    usable_bytes: int
    needed_bytes: int | None
    """Activations with their margin; None: the run is refused."""
    resident_bytes: int
    """Weights that stay on the card."""
    weights_bytes: int
    stock_bytes: int
    """Activations of core's own call."""
    workspace_bytes: int | None
    """Temporary memory of one layer; None: layers run unchunked."""
    refusal: str = ""


class NotFittedError(ValueError):
    """VRAM Fit does not know the model."""


class Planner:
    """Plans one case for any budget.

    Args:
        case: the model and its latent.
        one_byte: whether weights are stored in a byte each, and otherwise in 16 bits.

    Raises:
        NotFittedError: the model would run as it is.
    """

    def __init__(self, case: ModelCase, *, one_byte: bool) -> None:
        torch = host_module("torch")
        stored = torch.float8_e4m3fn if one_byte else torch.bfloat16
        base = model_of(case, stored, "meta", compute_dtype=torch.bfloat16 if one_byte else None)
        cpu = torch.device("cpu")
        self._patcher = host_module("comfy.model_patcher").ModelPatcher(base, load_device=cpu, offload_device=cpu)
        self._shape, self._conds, self._shapes = sampler_input(case)
        self._usable_bytes = 0
        native = pack_module("nodes.native.model").native_model(base.diffusion_model)
        if native is None:
            raise NotFittedError(f"{type(base.diffusion_model).__name__} is not known to VRAM Fit")
        fitting = pack_module("nodes.native.fitted_model")
        services = fitting.Services(usable_bytes=lambda: self._usable_bytes, check_cancelled=lambda: None)
        self._fit = fitting.FittedModel(native, base, services)

    def within(self, usable_bytes: int) -> Planned:
        """The plan that a sampler's run would begin with."""
        self._usable_bytes = usable_bytes
        errors = pack_module("i2v_core.errors")

        def prepare(*_args: Any, **_kwargs: Any) -> None:
            self._fit.prepare_sampling(lambda *_args, **_kwargs: None, self._patcher, self._shape, self._conds)

        try:
            self._fit.outer_sample(prepare, None, None, latent_shapes=self._shapes)
        except (errors.DoesNotFitError, RuntimeError) as error:
            stock = self.within(1 << 50)
            suggested = isinstance(error, errors.DoesNotFitError)
            return Planned(
                usable_bytes=usable_bytes,
                needed_bytes=None,
                resident_bytes=0,
                weights_bytes=stock.weights_bytes,
                stock_bytes=stock.stock_bytes,
                workspace_bytes=None,
                refusal=str(error) if suggested else "no smaller size can be traced",
            )
        plan = self._fit.plan
        return Planned(
            usable_bytes=usable_bytes,
            needed_bytes=plan.needed_bytes,
            resident_bytes=plan.resident_bytes,
            weights_bytes=plan.weights_bytes,
            stock_bytes=plan.stock_bytes,
            workspace_bytes=plan.workspace_bytes,
        )
