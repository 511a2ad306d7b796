"""Small denoisers of the real architecture, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

CROSS_ATTENTION_WIDTH = 64
TEXT_TOKENS = 7

Inputs = dict[str, Any]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Many threads slow tiny operations down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., I2VGenXLUNet]:
    """Builds a denoiser whose every parameter matters (diffusers starts some at zero, which would hide mistakes)."""

    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> I2VGenXLUNet:
        config: dict[str, Any] = {
            "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
            "up_block_types": ("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
            "block_out_channels": (32, 64, 96),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": CROSS_ATTENTION_WIDTH,
            "attention_head_dim": 8,
        }
        generator = torch.Generator().manual_seed(0)
        unet: Any = I2VGenXLUNet(**(config | changes))
        with torch.no_grad():
            for parameter in unet.parameters():
                fan_in = max(1, parameter[0].numel())
                noise = torch.randn(parameter.shape, generator=generator) * 0.5 / fan_in**0.5
                parameter.copy_(parameter * 0.5 + noise)
        return unet.to(dtype).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def unet(make_unet: Callable[..., I2VGenXLUNet]) -> I2VGenXLUNet:
    """Shared by tests, which must leave it as it is."""
    return make_unet()


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., Inputs]:
    def make(
        *,
        batch: int = 1,
        frames: int = 5,
        latent_height: int = 8,
        latent_width: int = 8,
        dtype: torch.dtype = torch.float32,
        width: int = CROSS_ATTENTION_WIDTH,
    ) -> Inputs:
        generator = torch.Generator().manual_seed(1)

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        return {
            "sample": noise(batch, 4, frames, latent_height, latent_width),
            "timestep": torch.tensor(501),
            "fps": torch.full((batch,), 16),
            "image_latents": noise(batch, 4, frames, latent_height, latent_width),
            "image_embeddings": noise(batch, width),
            "encoder_hidden_states": noise(batch, TEXT_TOKENS, width),
        }

    return make


@pytest.fixture(scope="session")
def relative_rms() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """The root mean square of the difference, relative to that of the reference (second)."""

    def measure(result: torch.Tensor, reference: torch.Tensor) -> float:
        difference = result.double() - reference.double()
        return (difference.square().mean() / reference.double().square().mean()).sqrt().item()

    return measure
