"""Every workflow file that is shipped: its format, its picture, its nodes as the host has them, and that it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from comfy_host.client import Client
from comfy_host.server import Server
from comfy_host.setup import PACK
from comfy_host.workflow import NOTES, to_prompt, widgets
from PIL import Image

FILES = sorted((PACK / "workflows").glob("*.json"))
DEMO = PACK / "workflows" / "i2v_demo.json"
INPUT = PACK / "assets" / "demo_input.png"

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def test_the_demo_is_there() -> None:
    assert DEMO in FILES


@every_file
def test_it_is_format_0_4_with_a_picture_beside_it(path: Path) -> None:
    workflow = read(path)
    assert workflow["version"] == 0.4
    assert workflow["last_node_id"] == max(node["id"] for node in workflow["nodes"])
    assert workflow["last_link_id"] == max(link[0] for link in workflow["links"])
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert min(picture.size) >= 64


@every_file
def test_both_ends_of_every_link_know_it(path: Path) -> None:
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == kind == nodes[target]["inputs"][slot]["type"]


@every_file
def test_its_nodes_are_the_hosts(path: Path, object_info: dict[str, Any]) -> None:
    for node in read(path)["nodes"]:
        if node["type"] in NOTES:
            continue
        info = object_info[node["type"]]
        known = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for slot in node["inputs"]:
            if slot["type"] != "IMAGEUPLOAD":  # the page's own button
                assert slot["name"].partition(".")[0] in known, (node["type"], slot["name"])
        outputs = list(zip(info["output_name"], info["output"], strict=True))
        assert [(output["name"], output["type"]) for output in node["outputs"]] == outputs
        values = node.get("widgets_values", [])
        drawn = widgets(info, values)
        assert [value for _, value in drawn[: len(values)]] == values
        # Older hosts lack some optional widgets of newer ones: a file may leave the last ones to their defaults.
        assert {name for name, _ in drawn[len(values) :]} <= set(info["input"].get("optional", {}))


@every_file
def test_the_host_accepts_it(path: Path, client: Client, server: Server, object_info: dict[str, Any]) -> None:
    shutil.copyfile(INPUT, server.input_folder / INPUT.name)
    prompt_id = client.queue(to_prompt(read(path), object_info))
    client.interrupt()
    assert prompt_id


@pytest.mark.slow
def test_the_demo_makes_a_video_that_starts_with_the_picture_and_moves(
    client: Client, server: Server, object_info: dict[str, Any]
) -> None:
    shutil.copyfile(INPUT, server.input_folder / INPUT.name)
    run = client.run(to_prompt(read(DEMO), object_info))
    (video,) = (
        file for output in run.outputs.values() for file in output.get("images", ()) if file["type"] == "output"
    )
    frames_FHWC = iio.imread(server.output_folder / video["subfolder"] / video["filename"], plugin="FFMPEG")
    assert frames_FHWC.shape == (16, 96, 96, 3)

    with Image.open(INPUT) as picture:
        expected_HWC = np.asarray(picture.convert("RGB").resize((96, 96), Image.Resampling.LANCZOS), float)
    error_RMS = np.sqrt(np.mean((frames_FHWC[0] - expected_HWC) ** 2, axis=None))
    assert 20 * np.log10(255 / error_RMS) > 20, "frame 0 is not recognisably the picture"
    motion = np.abs(np.diff(frames_FHWC.astype(float), axis=0)).max(axis=(1, 2, 3))
    assert motion.min() > 40, "two neighbouring frames are the same"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames"), [("i2v_decode_latent", 16), ("i2v_long_clip", 48)])
def test_a_workflow_saves_a_video_that_moves(
    name: str, frames: int, client: Client, server: Server, object_info: dict[str, Any]
) -> None:
    shutil.copyfile(INPUT, server.input_folder / INPUT.name)
    run = client.run(to_prompt(read(PACK / "workflows" / f"{name}.json"), object_info))
    (video,) = (file for output in run.outputs.values() for file in output.get("images", ()))
    frames_FHWC = iio.imread(server.output_folder / video["subfolder"] / video["filename"], plugin="pyav")
    assert frames_FHWC.shape == (frames, 96, 96, 3)
    assert np.abs(frames_FHWC[-1].astype(float) - frames_FHWC[0]).max() > 80
