"""A host that is killed in the middle of a run: the same prompt goes on from where it was."""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import psutil
import pytest
import torch
from comfy_host import setup
from comfy_host.client import Client, Event, Run
from comfy_host.errors import HostError
from comfy_host.server import Server
from PIL import Image

from .native_graphs import latent_of, node, sampler, write_wan

STEPS, KILLED_AT = 30, 12


@pytest.fixture
def mortal(tiny_folder: Path) -> Iterator[Server]:
    """A host of its own, since it will be killed."""
    with Server(setup.find(Path(sys.executable))) as running:
        shutil.copytree(tiny_folder, running.models_folder / "diffusers" / "tiny")
        Image.new("RGB", (96, 64), "navy").save(running.input_folder / "circle.png")
        yield running


def kill(server: Server) -> None:
    """Kill without a word, as the system does when memory is short."""
    process = psutil.Process(server.pid)
    for each in [*process.children(recursive=True), process]:
        each.kill()
    psutil.wait_procs([process])


def frames_of(run: Run, server: Server) -> np.ndarray[Any, Any]:
    return np.stack([iio.imread(server.output_folder / file["filename"]) for file in run.outputs["save"]["images"]])


def test_a_killed_host_goes_on_from_the_checkpoint(mortal: Server, make_prompt: Any, survived: Counter[str]) -> None:
    sampler = {"steps": STEPS, "seed": 3, "scheduler": "unipc"}
    undisturbed = Client(mortal.url).run(make_prompt(sampler={**sampler, "checkpoint": "off"}))
    expected = frames_of(undisturbed, mortal)
    prompt = make_prompt(sampler={**sampler, "checkpoint": "every step"})

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "sampler" and event.data["value"] >= KILLED_AT:
            kill(mortal)

    with pytest.raises((HostError, OSError)):
        Client(mortal.url).run(prompt, watch=watch)
    mortal.start()
    seen: list[int] = []
    again = Client(mortal.url).run(
        prompt, watch=lambda event: seen.append(event.data["value"]) if event.kind == "progress" else None
    )
    assert "resumed from step" in again.outputs["sampler"]["text"][0]
    assert f"of {STEPS}" in again.outputs["sampler"]["text"][0]
    np.testing.assert_array_equal(frames_of(again, mortal), expected)
    survived["hosts killed"] += 1


def two_samplers(file: str, checkpoint: str) -> dict[str, Any]:
    """Core's own nodes around VRAM Fit: the first half of the steps in one sampler, the second in another."""

    settings = {"noise_seed": 1, "steps": STEPS, "sampler_name": "dpmpp_2m_sde"}
    return {
        "loader": node("UNETLoader", unet_name=file, weight_dtype="default"),
        "fit": node("I2VVRAMFit", model=["loader", 0], budget="auto", checkpoint=checkpoint),
        "text": node("LotusConditioning"),
        "empty": node("EmptyHunyuanLatentVideo", width=192, height=192, length=9, batch_size=1),
        "first": sampler(["fit", 0], "empty", 0, KILLED_AT, **settings),
        "second": sampler(["fit", 0], "first", KILLED_AT, STEPS, **settings),
        "save": node("SaveLatent", samples=["second", 0], filename_prefix="crash"),
    }


def test_a_killed_host_resumes_cores_samplers_behind_vram_fit(mortal: Server, survived: Counter[str]) -> None:
    file = mortal.models_folder / "diffusion_models" / "crash.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_wan(file, ffn_dim=512)
    expected = latent_of(Client(mortal.url).run(two_samplers(file.name, "off")), mortal)
    prompt = two_samplers(file.name, "every step")

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "second" and event.data["value"] >= 3:
            kill(mortal)

    with pytest.raises((HostError, OSError)):
        Client(mortal.url).run(prompt, watch=watch)
    mortal.start()
    events: list[Event] = []
    again = Client(mortal.url).run(prompt, watch=events.append)
    said = {
        node: "\n".join(it.data["text"] for it in events if it.kind == "progress_text" and it.data["node"] == node)
        for node in ("first", "second")
    }
    assert "answered by the result of an earlier run" in said["first"]
    resumed = re.search(r"resumed: (\d+) calls", said["second"])
    assert resumed is not None
    assert int(resumed[1]) >= 3
    assert torch.equal(latent_of(again, mortal), expected)
    survived["hosts killed"] += 1
