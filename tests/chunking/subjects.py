"""What the tests of chunked execution need of each denoiser: small ones, inputs, and the published one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
from torch import nn

from i2v_core import chunking
from i2v_core.chunking import ChunkSettings, spatio_temporal_unet

CROSS_ATTENTION_WIDTH = 64
TEXT_TOKENS = 7

Inputs = dict[str, Any]
# (batch, frames, latent_height, latent_width, width of the context, a tensor of any values of this shape) -> inputs
MakeInputs = Callable[[int, int, int, int, int, Callable[..., torch.Tensor]], Inputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One kind of denoiser.

    `config` is that of a small one, `published_layout` what makes it of the published depth. `runs_layers_whole`: with
    workspace enough, layers run by their own forward, to the bit. `more_arguments` are those that its forward takes
    beside the inputs. `bounds_gib` are what the published one may take at most, with all weights in place and with
    those of two layers, by width, height and frames.
    """

    cls: Any
    chunked: Callable[..., AbstractContextManager[None]]
    config: Mapping[str, Any]
    published_layout: Mapping[str, Any]
    make_inputs: MakeInputs
    runs_layers_whole: bool
    bounds_gib: Mapping[tuple[int, int, int], tuple[float, float]]
    more_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def make(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """Every parameter matters: diffusers starts some at zero, which would hide mistakes."""
        generator = torch.Generator().manual_seed(0)
        unet = self.cls(**{**self.config, **changes})
        with torch.no_grad():
            for parameter in unet.parameters():
                fan_in = max(1, parameter[0].numel())
                noise = torch.randn(parameter.shape, generator=generator) * 0.5 / fan_in**0.5
                parameter.copy_(parameter * 0.5 + noise)
        return unet.to(dtype).eval().requires_grad_(False)

    def inputs(
        self,
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

        return self.make_inputs(batch, frames, latent_height, latent_width, width, noise)

    def published(self) -> Any:
        """The published architecture in fp16, without memory."""
        with torch.device("meta"):
            unet = self.cls()
        return nn.Module.to(unet, "meta", torch.float16).eval().requires_grad_(False)

    def published_inputs(self, batch: int, width: int, height: int, frames: int) -> Inputs:
        """Meta inputs for a picture of that many pixels."""

        def half(*shape: int) -> torch.Tensor:
            return torch.empty(shape, device="meta", dtype=torch.float16)

        inputs = self.make_inputs(batch, frames, height // 8, width // 8, 1024, half)
        return {name: tensor.to("meta") for name, tensor in inputs.items()}


def _i2vgen_xl_inputs(
    batch: int, frames: int, height: int, width: int, context_width: int, noise: Callable[..., torch.Tensor]
) -> Inputs:
    return {
        "sample": noise(batch, 4, frames, height, width),
        "timestep": torch.tensor(501),
        "fps": torch.full((batch,), 16),
        "image_latents": noise(batch, 4, frames, height, width),
        "image_embeddings": noise(batch, context_width),
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, context_width),
    }


def _svd_inputs(
    batch: int, frames: int, height: int, width: int, context_width: int, noise: Callable[..., torch.Tensor]
) -> Inputs:
    return {
        "sample": noise(batch, frames, 8, height, width),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": noise(batch, 1, context_width),
        "added_time_ids": noise(batch, 3),
    }


SUBJECTS: dict[str, Subject] = {
    "i2vgen-xl": Subject(
        cls=I2VGenXLUNet,
        chunked=chunking.chunked,
        config={
            "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
            "up_block_types": ("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
            "block_out_channels": (32, 64, 96),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": CROSS_ATTENTION_WIDTH,
            "attention_head_dim": 8,
        },
        published_layout={
            "block_out_channels": (16, 24, 32, 32),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
            "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
        },
        make_inputs=_i2vgen_xl_inputs,
        runs_layers_whole=True,
        bounds_gib={
            (512, 512, 16): (3.1, 1.2),
            (768, 768, 24): (4.3, 2.2),
            (1280, 704, 16): (3.95, 1.8),
            (1024, 1024, 32): (5.7, 3.5),
        },
        more_arguments={"cross_attention_kwargs": {}},
    ),
    "svd": Subject(
        cls=UNetSpatioTemporalConditionModel,
        chunked=spatio_temporal_unet.chunked,
        config={
            "down_block_types": ("DownBlockSpatioTemporal",) + ("CrossAttnDownBlockSpatioTemporal",) * 2,
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal",) * 2 + ("UpBlockSpatioTemporal",),
            "block_out_channels": (32, 64, 96),
            "num_attention_heads": (2, 4, 6),
            "layers_per_block": 1,
            "cross_attention_dim": CROSS_ATTENTION_WIDTH,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        published_layout={
            "block_out_channels": (32, 32, 64, 64),
            "num_attention_heads": (1, 2, 4, 4),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
            "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
        },
        make_inputs=_svd_inputs,
        runs_layers_whole=False,
        bounds_gib={(1024, 576, 14): (3.8, 1.3), (1024, 576, 25): (4.6, 2.2)},
    ),
}


def chunked(denoiser: nn.Module, settings: ChunkSettings, **options: Any) -> AbstractContextManager[None]:
    """As each family has it."""
    subject = next(it for it in SUBJECTS.values() if isinstance(denoiser, it.cls))
    return subject.chunked(denoiser, settings, **options)
