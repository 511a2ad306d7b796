"""Core's own model classes in this process, small and with random weights, and the pack's native models beside them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from comfy_host import model_case
from comfy_host.in_process import native_modules
from comfy_host.model_case import ModelCase

from .small_models import small_models

PACKAGE = "i2v_native_tests"
SMALL_MODELS = small_models()
CASE = "small_model"
"""Attachment of a patcher: the case it was made of."""
TOLERANCE = 1e-6
"""Share of the largest number of the result, in fp32."""


@dataclass(frozen=True, slots=True)
class Core:
    """The host's modules and the pack's, imported once."""

    sample: Any
    model_patcher: Any
    extension: Any
    ops: Any

    @staticmethod
    def native(name: str) -> Any:
        """A module of `nodes/native`."""
        return importlib.import_module(f"{PACKAGE}.nodes.native.{name}")

    @staticmethod
    def library(name: str) -> Any:
        """A module of the library, as the native models import it."""
        return importlib.import_module(f"{PACKAGE}.i2v_core.{name}")

    def chunked(self, patcher: Any, workspace_bytes: int | None) -> Any:
        """A fitted clone that always runs in chunks of a workspace (None: unchunked)."""
        fit = self.native("fit")
        clone, _ = fit.fitted(patcher, fit.Services(usable_bytes=lambda: 2**40, check_cancelled=lambda: None))
        plan = self.native("call_plan").CallPlan(
            workspace_bytes=workspace_bytes, peak_bytes=2**30, stock_bytes=2**30, usable_bytes=2**40, weights_bytes=0
        )
        clone.get_attachment(fit.KEY)._plan_of = lambda _: plan
        return clone


def off_by(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest number."""
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def core() -> Core:
    native_modules(PACKAGE)
    load = importlib.import_module
    return Core(load("comfy.sample"), load("comfy.model_patcher"), load("comfy.patcher_extension"), load("comfy.ops"))


@pytest.fixture
def make_patcher(core: Core) -> Callable[..., Any]:
    """Makes a small model with random weights, in a patcher as loaders give it."""

    def make(name: str, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None) -> Any:
        case = SMALL_MODELS[name]
        if not case.exists:
            pytest.skip(f"this ComfyUI has no {case.supported_model}")
        model = model_case.model_of(case, dtype, "cpu", compute_dtype=compute_dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in model.diffusion_model.state_dict().values():  # buffers that files have too
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
        cpu = torch.device("cpu")
        patcher = core.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        patcher.set_attachments(CASE, case)
        return patcher

    return make


@pytest.fixture
def sample(core: Core) -> Callable[..., torch.Tensor]:
    """Samples a small clip with core's own sampler; a latent of several parts comes back as one row of numbers."""

    def run(
        patcher: Any, *, steps: int = 1, cfg: float = 3.0, latent_shape: tuple[int, ...] | None = None
    ) -> torch.Tensor:
        case: ModelCase = patcher.get_attachment(CASE)
        if latent_shape is not None:
            case = replace(case, latent_shape=latent_shape)
        generator = torch.Generator().manual_seed(1)
        positive, negative = ([case.conditioning(generator, case.latent_shape)] for _ in range(2))
        noise = model_case.latent_of(case, lambda shape: torch.randn(shape, generator=generator))
        latent = model_case.latent_of(case, torch.zeros)
        result = core.sample.sample(
            patcher, noise, steps, cfg, "euler", "simple", positive, negative, latent, seed=1, disable_pbar=True
        )
        return torch.cat([it.flatten() for it in result.unbind()]) if result.is_nested else result

    return run
