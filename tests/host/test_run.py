"""From a picture to frames in a real host: results, caching, interruption."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from typing import Any

import imageio.v3 as iio
import numpy as np
import psutil
import pytest
from comfy_host.client import Client, Event, InterruptedRunError, Run
from comfy_host.server import Server

MIB = 1 << 20
PICTURE = "circle.png"


def frames_of(run: Run, server: Server) -> np.ndarray[Any, Any]:
    """The frames that the prompt's SaveImage wrote, (F, H, W, 3) in 0…255."""
    files = run.outputs["save"]["images"]
    return np.stack([iio.imread(server.output_folder / file["filename"]) for file in files]).astype(float)


def same_picture(server: Server, name: str) -> dict[str, str]:
    """The inputs of LoadImage for the same picture under another name, so that the host takes no cached result."""
    shutil.copyfile(server.input_folder / PICTURE, server.input_folder / name)
    return {"image": name}


def test_a_picture_and_a_prompt_become_frames(client: Client, server: Server, make_prompt: Any) -> None:
    run = client.run(make_prompt(budget={"width": 96, "height": 64, "frames": 3}))
    frames_FHWC = frames_of(run, server)
    assert frames_FHWC.shape == (3, 64, 96, 3)
    differences = [np.abs(a - b).mean() for a, b in itertools.pairwise(frames_FHWC)]
    assert min(differences) > 0.5


def test_every_stage_says_what_was_predicted_and_what_it_took(client: Client, make_prompt: Any) -> None:
    outputs = client.run(make_prompt(sampler={"seed": 11})).outputs
    stages = [outputs[node]["i2v_stage"][0] for node in ("encode", "sampler", "decode") if node in outputs]
    assert {stage["stage"] for stage in stages} >= {"sample", "decode"}
    for stage in stages:
        assert stage["seconds"] > 0
        assert 0.8 < stage["measured_peak_bytes"] / stage["predicted_peak_bytes"] < 1.2
    plan = outputs["budget"]["i2v_plan"][0]
    assert (plan["width"], plan["height"], plan["frames"], plan["precision"]) == (64, 64, 4, "fp32")
    assert f"{plan['width']}×{plan['height']}×{plan['frames']}" in outputs["budget"]["text"][0]


def test_the_same_seed_gives_the_same_frames(client: Client, server: Server, make_prompt: Any) -> None:
    first = frames_of(client.run(make_prompt(sampler={"seed": 5})), server)
    other = frames_of(client.run(make_prompt(sampler={"seed": 6})), server)
    again = client.run(make_prompt(picture=same_picture(server, "same.png"), sampler={"seed": 5}))
    assert "sampler" in again.executed
    np.testing.assert_array_equal(frames_of(again, server), first)
    assert np.abs(other - first).mean() > 0.5


def test_a_new_seed_runs_only_sampler_and_decode_again(client: Client, make_prompt: Any) -> None:
    client.run(make_prompt(sampler={"seed": 20}))
    again = client.run(make_prompt(sampler={"seed": 21}))
    assert again.executed == ["sampler", "decode", "save"]
    assert again.cached == {"picture", "loader", "budget", "encode"}


def test_the_same_prompt_runs_nothing_again(client: Client, make_prompt: Any) -> None:
    client.run(make_prompt(sampler={"seed": 30}))
    assert client.run(make_prompt(sampler={"seed": 30})).executed == []


def test_a_new_budget_runs_the_plan_again(client: Client, make_prompt: Any) -> None:
    client.run(make_prompt(budget={"budget": "1GiB"}))
    assert "budget" in client.run(make_prompt(budget={"budget": "2GiB"})).executed


class MemoryUse:
    """The memory that the host's process holds, or on an accelerator its allocator; and the highest value meanwhile."""

    def __init__(self, client: Client, server: Server) -> None:
        self._client = client
        self._on_cpu = client.system_stats()["devices"][0]["type"] == "cpu"
        self._process = psutil.Process(server.pid)
        self._stop = threading.Event()
        self.peak_bytes = 0

    def now_bytes(self) -> int:
        if self._on_cpu:
            tree = [self._process, *self._process.children(recursive=True)]
            return sum(process.memory_info().rss for process in tree)
        device = self._client.system_stats()["devices"][0]
        return device["torch_vram_total"] - device["torch_vram_free"]

    def settled_bytes(self, below_bytes: int, patience_seconds: float = 15.0) -> int:
        """The use once it is below `below_bytes`, or at the end of the patience."""
        deadline = time.monotonic() + patience_seconds
        while (now := self.now_bytes()) > below_bytes and time.monotonic() < deadline:
            time.sleep(0.2)
        return now

    def __enter__(self) -> MemoryUse:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self.now_bytes())


def interrupted_at(client: Client, prompt: Any, node: str, progress: int) -> float:
    """Run `prompt`, interrupt it when `node` has reached `progress`; the seconds that it took to end after that."""
    asked_at = 0.0

    def watch(event: Event) -> None:
        nonlocal asked_at
        if event.kind == "progress" and event.data["node"] == node and event.data["value"] >= progress and not asked_at:
            asked_at = time.monotonic()
            client.interrupt()

    with pytest.raises(InterruptedRunError):
        client.run(prompt, watch=watch)
    return time.monotonic() - asked_at


def test_an_interrupted_run_gives_its_memory_back(client: Client, server: Server, make_prompt: Any) -> None:
    size = {"width": 256, "height": 256, "frames": 32}
    client.run(make_prompt(budget=size, sampler={"steps": 1}))  # what is loaded and cached once, and stays
    memory = MemoryUse(client, server)
    before_bytes = memory.settled_bytes(0, patience_seconds=2.0)
    slack_bytes = 32 * MIB
    with memory:
        seconds = interrupted_at(client, make_prompt(budget=size, sampler={"steps": 1000}), "sampler", 2)
    assert seconds < 5
    assert memory.peak_bytes > before_bytes + 2 * slack_bytes, "too small a run to tell"
    assert memory.settled_bytes(before_bytes + slack_bytes) <= before_bytes + slack_bytes


def test_after_an_interruption_the_next_run_is_right(client: Client, server: Server, make_prompt: Any) -> None:
    expected = frames_of(client.run(make_prompt(sampler={"seed": 40})), server)
    interrupted_at(client, make_prompt(sampler={"seed": 41, "steps": 1000}), "sampler", 2)
    run = client.run(make_prompt(picture=same_picture(server, "again.png"), sampler={"seed": 40}))
    assert "sampler" in run.executed
    np.testing.assert_array_equal(frames_of(run, server), expected)
