"""A host that is killed in the middle of a run: the same prompt goes on from where it was."""

from __future__ import annotations

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
from comfy_host import setup
from comfy_host.client import Client, Event, Run
from comfy_host.errors import HostError
from comfy_host.server import Server
from PIL import Image

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
