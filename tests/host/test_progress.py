"""A node's display while it runs: words, and previews in which all frames move."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_host import setup
from comfy_host.client import Client, Event, Run
from comfy_host.server import Server
from PIL import Image, ImageSequence
from safetensors.torch import save_file

from i2v_core.families.preview import tiny_decoder

FRAMES = 4
MEMORY = re.compile(r"[\d.]+ MiB in use, peak [\d.]+ MiB of [\d.]+ GiB")
BLUE = 0.25
"""Of whatever the tiny decoder of the test decodes."""
ROUGH, DECODED = (384, 384, 3), (64, 64, 3)
"""Rough previews are enlarged to be seen, decoded ones are as large as the video."""


def sd1_autoencoder(folder: Path) -> None:
    """An autoencoder of Stable Diffusion 1's own size, with random weights, in place of the small one."""
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL
    with torch.device("meta"):
        vae = kind(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=2,
            force_upcast=False,
        )
    vae = vae.half().to_empty(device="cpu")
    for name, parameter in vae.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else parameter.data.fill_("weight" in name)
    assert tiny_decoder(vae.config) is not None
    shutil.rmtree(folder)
    vae.save_pretrained(folder, safe_serialization=True)


def bluish_taesd(file: Path) -> None:
    """A tiny decoder in the host's layout with random weights that gives the same blue everywhere."""
    channels = 64
    state: dict[str, torch.Tensor] = {}

    def conv(index: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
        state[f"{index}.weight"] = 0.04 * torch.randn(outputs, inputs, 3, 3)
        if bias:
            state[f"{index}.bias"] = torch.zeros(outputs)

    conv("1", 4, channels)
    for block in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        for layer in (0, 2, 4):
            conv(f"{block}.conv.{layer}", channels, channels)
    for upsampled in (7, 12, 17):
        conv(str(upsampled), channels, channels, bias=False)
    state["19.weight"], state["19.bias"] = 0.2 * torch.randn(3, channels, 3, 3), torch.full((3,), BLUE)
    state["19.weight"][2] = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file)


@pytest.fixture(scope="module")
def taesd_server(tiny_folder: Path) -> Iterator[Server]:
    """A host that was asked for previews by TAESD, with two models: one of Stable Diffusion 1's latents, one not."""
    with Server(setup.find(Path(sys.executable)), arguments=["--preview-method", "taesd"]) as running:
        models = running.models_folder / "diffusers"
        shutil.copytree(tiny_folder, models / "tiny")
        shutil.copytree(tiny_folder, models / "sd1")
        sd1_autoencoder(models / "sd1" / "vae")
        Image.new("RGB", (96, 64), "navy").save(running.input_folder / "circle.png")
        yield running


def watched(client: Client, prompt: Any, kind: str) -> tuple[Run, list[dict[str, Any]]]:
    """The run, and its events of one kind."""
    seen: list[dict[str, Any]] = []

    def watch(event: Event) -> None:
        if event.kind == kind:
            seen.append(event.data)

    return client.run(prompt, watch=watch), seen


def previews_of(client: Client, prompt: Any) -> list[np.ndarray[Any, Any]]:
    """Each preview as (F, H, W, 3)."""
    _, seen = watched(client, prompt, "preview")
    films = [Image.open(io.BytesIO(event["image"])) for event in seen]
    return [np.stack([np.asarray(it.convert("RGB")) for it in ImageSequence.Iterator(film)]) for film in films]


@pytest.fixture
def sampled(make_prompt: Any) -> Any:
    """Makes a prompt that ends at the latent, which nothing has in its cache."""

    def make(model: str, seed: int) -> Any:
        prompt = make_prompt(loader={"model": model}, budget={"frames": FRAMES}, sampler={"seed": seed, "steps": 3})
        del prompt["decode"], prompt["save"]
        prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["sampler", 0]}}
        return prompt

    return make


def test_the_sampler_and_the_decoder_say_how_far_they_are(client: Client, make_prompt: Any) -> None:
    run, said = watched(client, make_prompt(sampler={"seed": 70, "steps": 3}), "progress_text")
    assert "sampler" in run.executed
    texts = {node: [it["text"] for it in said if it["node"] == node] for node in ("sampler", "decode")}
    assert texts["sampler"][0].startswith("step 1 of 3, warming up;\n")
    assert texts["sampler"][-1].startswith("3 steps in ")
    assert texts["decode"][0].startswith("frame 1 of 4, warming up;\n")
    assert texts["decode"][-1].startswith("4 frames in ")
    for text in (it for node in texts.values() for it in node):
        assert MEMORY.fullmatch(text.splitlines()[1])


def test_what_was_planned_again_is_said_while_it_runs(client: Client, make_prompt: Any) -> None:
    prompt = make_prompt(budget={"plan_for": "8 GB", "precision": "fp32"}, sampler={"seed": 71})
    _, said = watched(client, prompt, "progress_text")
    texts = [it["text"] for it in said if it["node"] == "sampler"]
    assert all("planned again for" in text for text in texts)
    assert texts


@pytest.mark.slow
def test_a_tiny_decoder_is_used_for_its_own_latents_alone(taesd_server: Server, sampled: Any) -> None:
    client = Client(taesd_server.url)
    rough = previews_of(client, sampled("sd1", 80))
    assert [film.shape[1:] for film in rough] == [ROUGH] * 3
    assert "taesd_decoder.safetensors" in taesd_server.log()
    bluish_taesd(taesd_server.models_folder / "vae_approx" / "taesd_decoder.safetensors")
    (first, *_) = previews_of(client, sampled("sd1", 81))
    assert first.shape == (FRAMES, *DECODED)
    assert abs(first[..., 2].mean() - 255 * BLUE) < 20
    assert [film.shape for film in previews_of(client, sampled("tiny", 82))] == [(FRAMES, *ROUGH)] * 3


@pytest.mark.slow
def test_a_file_that_is_no_decoder_ends_no_run(taesd_server: Server, sampled: Any) -> None:
    file = taesd_server.models_folder / "vae_approx" / "taesd_decoder.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"other": torch.zeros(3)}, file)
    films = previews_of(Client(taesd_server.url), sampled("sd1", 83))
    assert [film.shape[1:] for film in films] == [ROUGH] * 3
    assert "does not hold a preview decoder" in taesd_server.log()
