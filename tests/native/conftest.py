"""Core's own model classes in this process, small and with random weights, and the pack's native models beside them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
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

    def recorded_calls(self, patcher: Any, conds: Any) -> list[Any]:
        """The calls to come for the latent of a patcher's case."""
        model, case = patcher.model, patcher.get_attachment(CASE)
        return self.native("recorded_call").recorded_calls(model, case.latent_shape, conds)

    def chunked(self, patcher: Any, workspace_bytes: int | None) -> Any:
        """A fitted clone that always runs in chunks of a workspace (None: unchunked)."""
        fit = self.native("fit")
        clone, _ = fit.fitted(patcher, fit.Services(usable_bytes=lambda: 2**40, check_cancelled=lambda: None))
        plan = self.native("call_plan").CallPlan(
            workspace_bytes=workspace_bytes, peak_bytes=2**30, stock_bytes=2**30, usable_bytes=2**40, weights_bytes=0
        )
        fitted = clone.get_attachment(fit.KEY)
        if fitted is not None:
            fitted._planner.recorded = lambda *_: []  # planning traces calls, and has tests of its own
            fitted._plan_of = lambda _: plan
        return clone


def called_twice(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Runs a block twice in its place, as another node's `patches_replace` may: the block's input is held meanwhile."""
    extra["original_block"](args)
    return extra["original_block"](args)


def by_place(layer: Any) -> Callable[..., torch.Tensor]:
    """Another node's forward for a layer, which looks at a token's place, as regional prompts do."""

    def forward(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        weights = torch.linspace(0, 1, x.shape[1]).view(1, -1, 1)
        return type(layer).forward(layer, x, *args, **options) * weights

    return forward


def off_by(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference as a share of the largest number."""
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module", autouse=True)
def small(one_thread: None) -> None:
    """Small models compute in one thread."""


def predicted_and_measured(
    core: Core, patcher: Any, sample: Callable[..., Any], workspace_bytes: int | None
) -> list[tuple[int, int]]:
    """The twin's peak for each call of a run, and the metered one of the whole model."""
    twin, memory = core.native("twin"), core.native("kernel_memory")
    model = patcher.model.diffusion_model
    peaks: list[tuple[int, int]] = []

    def metered(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor(*args, **kwargs)  # core keeps some tables from its first call on
        shapes = twin.Twin(core.native("model").native_model(model), model, patcher.model.get_dtype_inference())
        predicted = shapes.peak_bytes(twin.Call(model, args, kwargs), workspace_bytes)
        with memory.kernel_meter(torch.device("cpu"), "cpu") as measured:
            result = executor(*args, **kwargs)
        peaks.append((predicted, measured.peak_bytes))
        return result

    clone = core.chunked(patcher, workspace_bytes)
    clone.add_wrapper_with_key(core.extension.WrappersMP.DIFFUSION_MODEL, "metered", metered)
    options = clone.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = core.native("attention_memory").attention_output
    sample(clone, cfg=1.0)
    return peaks


@pytest.fixture(scope="session")
def core() -> Core:
    native_modules(PACKAGE)
    load = importlib.import_module
    return Core(load("comfy.sample"), load("comfy.model_patcher"), load("comfy.patcher_extension"), load("comfy.ops"))


@pytest.fixture(scope="session")
def make_patcher(core: Core) -> Callable[..., Any]:
    """Makes a small model with random weights, in a patcher as loaders give it; `config` changes its configuration."""

    def make(
        name: str,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Any:
        case = SMALL_MODELS[name]
        case = replace(case, config={**case.config, **(config or {})})
        if not case.exists:
            pytest.skip(f"this ComfyUI has no {case.supported_model}")
        model = model_case.model_of(case, dtype, "cpu", compute_dtype=compute_dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for path, tensor in model.diffusion_model.state_dict().items():  # buffers that files have too
                tensor.copy_(_random_weight(path, tensor.shape, generator))
        cpu = torch.device("cpu")
        patcher = core.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        patcher.set_attachments(CASE, case)
        return patcher

    return make


def _random_weight(path: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Numbers with which every layer's output is about as large as its input, so that an error in any of them is seen.

    With small weights attention is uniform, and a result hardly depends on queries, keys or positions.
    """
    values = torch.randn(shape, generator=generator)
    if not path.endswith("weight"):
        return values * 0.05
    return values / math.sqrt(shape[1:].numel()) if len(shape) > 1 else 1 + values * 0.05  # or a norm's


@pytest.fixture
def casts_of(core: Core, monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], list[str]]:
    """Starts a list of the layers whose weights core casts from a dtype, which grows with each cast."""

    def start(stored: torch.dtype) -> list[str]:
        casts: list[str] = []
        cast = core.ops.cast_bias_weight

        def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if layer.weight.dtype is stored:  # weights that are held have been cast before
                casts.append(type(layer).__name__)
            return cast(layer, *args, **kwargs)

        monkeypatch.setattr(core.ops, "cast_bias_weight", counted)
        return casts

    return start


@pytest.fixture(scope="session")
def sample(core: Core) -> Callable[..., torch.Tensor]:
    """Samples a small clip with core's own sampler; a latent of several parts comes back as one row of numbers."""

    def run(
        patcher: Any,
        *,
        steps: int = 1,
        cfg: float = 3.0,
        latent_shape: tuple[int, ...] | None = None,
        noise_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        case: ModelCase = patcher.get_attachment(CASE)
        if latent_shape is not None:
            case = replace(case, latent_shape=latent_shape)
        generator = torch.Generator().manual_seed(1)
        positive, negative = ([case.conditioning(generator, case.latent_shape)] for _ in range(2))
        noise = model_case.latent_of(case, lambda shape: torch.randn(shape, generator=generator))
        latent = model_case.latent_of(case, torch.zeros)
        # At full noise CogVideoX's latents are thousands of times what its blocks add, and hide it.
        options = {"denoise": 0.5, "noise_mask": noise_mask, "seed": 1, "disable_pbar": True}
        result = core.sample.sample(
            patcher, noise, steps, cfg, "euler", "simple", positive, negative, latent, **options
        )
        return torch.cat([it.flatten() for it in result.unbind()]) if result.is_nested else result

    return run
