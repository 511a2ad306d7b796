"""I2V Memory Report in a real host: the picture of a run, and what is refused."""

from __future__ import annotations

import urllib.parse
import urllib.request
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from comfy_host.client import Client, ExecutionError, PromptRefusedError
from comfy_host.server import Server


def with_report(prompt: Any, **inputs: Any) -> Any:
    """The prompt with the node on these inputs, its table shown, and its picture saved."""
    prompt["report"] = {"class_type": "I2VMemoryReport", "inputs": inputs}
    prompt["table"] = {"class_type": "PreviewAny", "inputs": {"source": ["report", 1]}}
    prompt["picture of memory"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["report", 0], "filename_prefix": "memory"},
    }
    return prompt


def shown_picture(client: Client, output: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The picture as the page gets it for the node."""
    (image,) = output["images"]
    with urllib.request.urlopen(f"{client.url}/view?{urllib.parse.urlencode(image)}", timeout=30) as answer:
        return iio.imread(answer.read())


def stages_in(table: str) -> list[str]:
    return [line.split()[0] for line in table.splitlines()]


@pytest.fixture
def without_frames(make_prompt: Any) -> Any:
    """A prompt that ends at the latent."""
    prompt = make_prompt(sampler={"seed": 61})
    del prompt["decode"], prompt["save"]
    return prompt


def test_a_run_is_drawn_with_all_its_stages(client: Client, server: Server, make_prompt: Any) -> None:
    run = client.run(with_report(make_prompt(sampler={"seed": 60}), report=["decode", 1]))
    assert stages_in(run.outputs["table"]["text"][0]) == ["stage", "encode", "sample", "decode"]
    shown_HW3 = shown_picture(client, run.outputs["report"])[..., :3]
    (saved,) = run.outputs["picture of memory"]["images"]
    np.testing.assert_array_equal(iio.imread(server.output_folder / saved["filename"])[..., :3], shown_HW3)
    assert shown_HW3.shape[1] == 1280
    assert shown_HW3.std() > 10


def test_a_latent_is_enough_for_a_run_that_is_not_decoded(client: Client, without_frames: Any) -> None:
    run = client.run(with_report(without_frames, latent=["sampler", 0]))
    assert stages_in(run.outputs["table"]["text"][0]) == ["stage", "encode", "sample"]


def test_a_video_that_is_decoded_into_its_file_has_a_report(client: Client, without_frames: Any) -> None:
    inputs = {"model": ["loader", 0], "plan": ["budget", 0], "latent": ["sampler", 0]}
    settings = {"filename_prefix": "reported", "format": "png", "fps": 8.0, "quality": 19}
    without_frames["video"] = {"class_type": "I2VSaveVideo", "inputs": {**settings, **inputs}}
    run = client.run(with_report(without_frames, report=["video", 1]))
    assert stages_in(run.outputs["table"]["text"][0]) == ["stage", "encode", "sample", "decode"]


def test_both_are_refused_before_anything_runs(client: Client, make_prompt: Any) -> None:
    with pytest.raises(PromptRefusedError, match=r"both report and latent are connected.*Remedy: ") as refusal:
        client.run(with_report(make_prompt(), report=["decode", 1], latent=["sampler", 0]))
    assert "report" in refusal.value.node_errors


def test_neither_is_refused_when_its_turn_comes(client: Client, make_prompt: Any) -> None:
    """The host validates nothing of a node without inputs before it runs."""
    with pytest.raises(ExecutionError, match=r"neither report nor latent is connected.*Remedy: "):
        client.run(with_report({"picture": make_prompt()["picture"]}))


def test_a_loaded_latent_and_saved_images_have_no_stages(client: Client, make_prompt: Any) -> None:
    loaded = {"latent": {"class_type": "I2VLoadLatent", "inputs": {"file": "demo (bundled)"}}}
    with pytest.raises(ExecutionError, match=r"has no report.*Remedy: connect the latent of Chunked Sampler"):
        client.run(with_report(loaded, latent=["latent", 0]))
    prompt = {"picture": make_prompt()["picture"]}
    settings = {"filename_prefix": "reported", "format": "png", "fps": 8.0, "quality": 19}
    prompt["video"] = {"class_type": "I2VSaveVideo", "inputs": {**settings, "images": ["picture", 0]}}
    with pytest.raises(ExecutionError, match=r"knows of no stage.*Remedy: "):
        client.run(with_report(prompt, report=["video", 1]))


def test_a_value_in_place_of_a_report_is_refused(client: Client, make_prompt: Any) -> None:
    with pytest.raises(ExecutionError, match=r"report is 5, which is not a report\. Remedy: connect VAE Tiled Decode"):
        client.run(with_report({"picture": make_prompt()["picture"]}, report=5))
