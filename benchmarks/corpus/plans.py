"""Plans of VRAM Fit for a model that is not there: its configuration, on meta tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        one_byte: whether weights of linear layers are stored in a byte each, and not in 16 bits.

    Raises:
        NotFittedError: the model would run as it is.
    """

    def __init__(self, case: ModelCase, *, one_byte: bool) -> None:
        torch = host_module("torch")
        base = _model_of_bytes(case, torch) if one_byte else model_of(case, torch.bfloat16, "meta")
        patcher = host_module("comfy.model_patcher").ModelPatcher(
            base, load_device=torch.device("cuda"), offload_device=torch.device("cpu")
        )
        _plan_as_on_a_card()
        fitting = pack_module("nodes.native.fit")
        services = fitting.Services(usable_bytes=lambda: self._usable_bytes, check_cancelled=lambda: None)
        self._usable_bytes = 0
        self._patcher, report = fitting.fitted(patcher, services)
        self._fit = self._patcher.get_attachment(fitting.KEY)
        if self._fit is None:
            raise NotFittedError(report)
        self._shape, self._conds, self._shapes = sampler_input(case)

    def within(self, usable_bytes: int) -> Planned:
        """The plan that a sampler's run would begin with."""
        self._usable_bytes = usable_bytes
        errors = pack_module("i2v_core.errors")
        try:
            self._fit.outer_sample(self._prepare, None, None, latent_shapes=self._shapes)
        except errors.DoesNotFitError as error:
            ample = self.within(1 << 50)
            return replace(ample, usable_bytes=usable_bytes, needed_bytes=None, resident_bytes=0, refusal=str(error))
        plan = self._fit.plan
        if plan is None:
            raise NotFittedError("its calls cannot be traced")
        return Planned(
            usable_bytes=usable_bytes,
            needed_bytes=plan.needed_bytes,
            resident_bytes=plan.resident_bytes,
            weights_bytes=plan.weights_bytes,
            stock_bytes=plan.stock_bytes,
            workspace_bytes=plan.workspace_bytes,
        )

    def _prepare(self, *_args: Any, **_kwargs: Any) -> None:
        """The part of a sampler's run that plans it."""
        self._fit.prepare_sampling(lambda *_args, **_kwargs: None, self._patcher, self._shape, self._conds)


def _model_of_bytes(case: ModelCase, torch: Any) -> Any:
    """A model as files of a byte a weight have it: linear layers in 8 bits, norms, biases and embeddings in 16."""
    base = model_of(case, torch.float8_e4m3fn, "meta", compute_dtype=torch.bfloat16)
    for layer in base.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if name == "weight" and isinstance(layer, torch.nn.Linear):
                continue
            if parameter.dtype == torch.float8_e4m3fn:
                setattr(layer, name, torch.nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))
    return base


def _plan_as_on_a_card() -> None:
    """Count PyTorch's attention, which core takes on a card, whatever it takes in this process."""
    planner, memory = (pack_module(f"nodes.native.{name}") for name in ("call_planner", "attention_memory"))
    attention = host_module("comfy.ldm.modules.attention")

    def fused(_chosen: Any, *args: Any, **kwargs: Any) -> Any:
        return memory.attention_output(attention.attention_pytorch.__wrapped__, *args, **kwargs)

    planner.attention_output = fused
