"""A model of the published size with random weights, for measurements that do not depend on their values."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from i2v_core.decoding import ONE_FRAME_UNTILED
from i2v_core.families import Conditioning, I2VModel, TensorMap, VideoSize, bundled_architecture, family_of

ARCHITECTURE = bundled_architecture("i2vgen-xl")
FAMILY = family_of(ARCHITECTURE)
DENOISER = FAMILY.denoisers(ARCHITECTURE)[0].component
PRECISION, DTYPE = "fp16", torch.float16
SEED = 1


def random_model(device: torch.device) -> I2VModel:
    """Build the published architecture with random weights in fp16, in host memory."""
    torch.manual_seed(SEED)
    names = {DENOISER, FAMILY.decoder}
    workloads = FAMILY.encode_workloads(
        ARCHITECTURE, FAMILY.facts.default_size, guidance=True, tiling=ONE_FRAME_UNTILED
    )
    names |= {workload.component for workload in workloads}
    modules: dict[str, nn.Module] = {}
    for name in sorted(names):
        with device:  # a GPU draws billions of random numbers in a moment
            module = FAMILY.skeleton(ARCHITECTURE, name).requires_grad_(False)
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():  # diffusers starts some layers at zero
                parameter.normal_(std=0.5 / parameter[0].numel() ** 0.5)
        modules[name] = nn.Module.to(module, "cpu", DTYPE)
    return I2VModel(architecture=ARCHITECTURE, folder=Path(), modules=modules, tokenizer=None)


def random_conditioning(size: VideoSize) -> Conditioning:
    """Return random conditioning of the shapes that the encoders return."""
    generator = torch.Generator().manual_seed(SEED)
    width = ARCHITECTURE.config("unet")["cross_attention_dim"]
    length = ARCHITECTURE.config("tokenizer")["model_max_length"]
    image_latents = torch.randn(FAMILY.facts.latent_size(size).shape_bcthw, generator=generator)

    def branch() -> TensorMap:
        return {
            "encoder_hidden_states": torch.randn(1, length, width, generator=generator),
            "image_embeddings": torch.randn(1, 1, width, generator=generator),
            "image_latents": image_latents,
            "fps": torch.tensor([float(FAMILY.facts.default_fps)]),
        }

    return Conditioning(
        family=ARCHITECTURE.family,
        size=size,
        positive=branch(),
        negative=branch(),
        preview_factors=torch.zeros(FAMILY.facts.latent_channels + 1, 3),
    )
