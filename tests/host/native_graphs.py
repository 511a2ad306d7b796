"""Graphs of core's own nodes with a small Wan model of random weights, for tests in a real host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from comfy_host.client import Run
from comfy_host.in_process import native_modules
from comfy_host.model_case import ModelCase, model_of
from comfy_host.server import Server
from safetensors.torch import load_file, save_file

TEXT_WIDTH = 1024
"""Width of the only conditioning that a node of core makes without a text encoder."""


def write_wan(file: Path, *, ffn_dim: int, seed: int = 0) -> None:
    """Write a model to a file of core's own layout, which its loaders recognise."""
    native_modules("i2v_host_tests")
    config = {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "patch_size": (1, 2, 2),
        "dim": 256,
        "ffn_dim": ffn_dim,
        "num_heads": 2,
        "num_layers": 2,
        "in_dim": 16,
        "out_dim": 16,
        "text_dim": TEXT_WIDTH,
    }
    case = ModelCase(supported_model="WAN21_T2V", config=config, latent_shape=(), conditioning=lambda *_: [])
    generator = torch.Generator().manual_seed(seed)
    shapes = model_of(case, torch.float32, "meta").diffusion_model.state_dict()
    state = {name: torch.randn(it.shape, generator=generator) * 0.05 for name, it in shapes.items()}
    save_file(state, file, {"config": json.dumps({"transformer": {"text_dim": TEXT_WIDTH}})})


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt."""
    return {"class_type": kind, "inputs": inputs}


def sampler(model: list[Any], latent: str, first: int, last: int, **settings: Any) -> dict[str, Any]:
    """A part of the steps, from the node `text`; the first part adds the noise, and leaves some of it to the next."""
    begins = "enable" if first == 0 else "disable"
    return node(
        "KSamplerAdvanced",
        model=model,
        positive=["text", 0],
        negative=["text", 0],
        latent_image=[latent, 0],
        add_noise=begins,
        cfg=1.0,
        scheduler="simple",
        start_at_step=first,
        end_at_step=last,
        return_with_leftover_noise=begins,
        **settings,
    )


def latent_of(run: Run, server: Server) -> torch.Tensor:
    """The latent that a run's node `save` has written."""
    (saved,) = run.outputs["save"]["latents"]
    return load_file(server.output_folder / saved["subfolder"] / saved["filename"])["latent_tensor"]
