"""Core's own model classes in this process, small and with random weights, and the pack's native models beside them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from comfy_host.in_process import native_modules

PACKAGE = "i2v_native_tests"
BASE = {
    "image_model": "wan2.1",
    "patch_size": (1, 2, 2),
    "text_len": 512,
    "dim": 96,
    "ffn_dim": 160,
    "freq_dim": 32,
    "text_dim": 4096,
    "out_dim": 16,
    "num_heads": 4,
    "num_layers": 3,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t2v": ("WAN21_T2V", {**BASE, "model_type": "t2v", "in_dim": 16}),
    "i2v": ("WAN21_I2V", {**BASE, "model_type": "i2v", "in_dim": 36}),
    "flf2v": ("WAN21_I2V", {**BASE, "model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514}),
    "ti2v": ("WAN22_T2V", {**BASE, "model_type": "t2v", "in_dim": 48, "out_dim": 48}),
    "vace": ("WAN21_Vace", {**BASE, "model_type": "vace", "in_dim": 16, "vace_layers": 3, "vace_in_dim": 96}),
    "camera": ("WAN21_Camera", {**BASE, "model_type": "camera", "in_dim": 32, "in_dim_control_adapter": 24}),
}


@dataclass(frozen=True, slots=True)
class Core:
    """The host's modules and the pack's, imported once."""

    sample: Any
    supported_models: Any
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


@pytest.fixture(scope="session")
def core() -> Core:
    native_modules(PACKAGE)
    load = importlib.import_module
    return Core(
        load("comfy.sample"),
        load("comfy.supported_models"),
        load("comfy.model_patcher"),
        load("comfy.patcher_extension"),
        load("comfy.ops"),
    )


@pytest.fixture
def make_patcher(core: Core) -> Callable[..., Any]:
    """Makes a small model with random weights, in a patcher as loaders give it."""

    def make(kind: str, dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None) -> Any:
        name, config = CONFIGS[kind]
        chosen = getattr(core.supported_models, name)(dict(config))
        chosen.set_inference_dtype(dtype, compute_dtype)
        model = chosen.get_model({}, "", device="cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        cpu = torch.device("cpu")
        return core.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    return make


@pytest.fixture
def sample(core: Core) -> Callable[..., torch.Tensor]:
    """Samples a small clip with core's own sampler."""

    def run(patcher: Any, *, frames: int = 3, side: int = 16, steps: int = 1, cfg: float = 3.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        channels = patcher.model.latent_format.latent_channels
        shape = (1, channels, frames, side, side + 8)

        def conditioning() -> list[Any]:
            options: dict[str, Any] = {}
            if hasattr(patcher.model.diffusion_model, "vace_blocks"):
                options = {
                    "vace_frames": [torch.randn(1, 32, frames, side, side + 8, generator=generator)],
                    "vace_mask": [torch.ones(1, 64, frames, side, side + 8)],
                    "vace_strength": [0.7],
                }
            return [[torch.randn(1, 20, 4096, generator=generator), options]]

        positive, negative = conditioning(), conditioning()
        noise = torch.randn(shape, generator=generator)
        return core.sample.sample(
            patcher,
            noise,
            steps,
            cfg,
            "euler",
            "simple",
            positive,
            negative,
            torch.zeros(shape),
            seed=1,
            disable_pbar=True,
        )

    return run
