"""Every workflow file that is shipped: its format, its picture, its nodes as the host has them, and that it runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from comfy_host.client import Client, Run
from comfy_host.server import Server
from comfy_host.setup import PACK
from comfy_host.workflow import to_prompt, widgets
from graphs.flat import NOTES, flat_nodes
from model_stubs import write_named_files
from PIL import Image

from i2v_core.families import VideoSize, bundled_architecture, with_weights
from i2v_core.planning.cards import CARDS
from i2v_core.planning.plan import Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.trace import loaded_bytes
from i2v_core.units import GIB
from tests.wan_files import save_wan_of_blocks, write_gguf

CARDS_FILES = {6: "i2vgen_xl_6gb", 12: "i2vgen_xl_12gb", 24: "i2vgen_xl_24gb"}
REAL_MODEL = "i2vgen-xl"
FILES = sorted((PACK / "workflows").glob("*.json"))
DEMO = PACK / "workflows" / "i2v_demo.json"
INPUT = PACK / "assets" / "demo_input.png"

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def real_model(
    server: Server, tiny_models: dict[str, Callable[[Path], None]], save_wan: Callable[..., None]
) -> Iterator[None]:
    """Small models under the names that workflows for real ones ask for."""
    folder = server.models_folder / "diffusers" / REAL_MODEL
    shutil.copytree(server.models_folder / "diffusers" / "tiny", folder)
    svd_folder = server.models_folder / "diffusers" / "svd"
    tiny_models["svd"](svd_folder)
    wan_folder = server.models_folder / "diffusers" / "wan2.2-ti2v-5b"
    save_wan(wan_folder, layout="wan2.2-ti2v")
    quantised_folder = server.models_folder / "diffusers" / "wan2.1-i2v-14b-480p"
    transformer = save_wan_of_blocks(save_wan, quantised_folder)["transformer"]
    (server.models_folder / "diffusion_models").mkdir(exist_ok=True)
    file = server.models_folder / "diffusion_models" / "wan2.1-i2v-14b-480p-Q4_K_M.gguf"
    write_gguf(file, transformer.state_dict())
    named = {it for path in FILES for it in write_named_files(read(path), server.models_folder)}
    yield
    for it in (folder, svd_folder, wan_folder, quantised_folder):
        shutil.rmtree(it)
    for it in (file, *named):
        it.unlink()


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
        assert min(picture.size) >= 256
        assert 0.8 < picture.width / picture.height < 1.25, "the template browser's cards are square"


@every_file
def test_both_ends_of_every_link_know_it(path: Path) -> None:
    workflow = read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, output, target, slot, kind in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == kind == nodes[target]["inputs"][slot]["type"]


def skip_if_unknown(path: Path, object_info: dict[str, Any]) -> None:
    """Older hosts lack nodes of newer models."""
    unknown = {it.node["type"] for it in flat_nodes(read(path))} - set(object_info)
    if unknown:
        assert not any(it.startswith("I2V") for it in unknown)
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(unknown))}")


@every_file
def test_its_nodes_are_the_hosts(path: Path, object_info: dict[str, Any]) -> None:
    skip_if_unknown(path, object_info)
    for node in read(path)["nodes"]:
        if node["type"] in NOTES:
            continue
        info = object_info[node["type"]]
        known = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for slot in node["inputs"]:
            if slot["type"] != "IMAGEUPLOAD":  # the page's own button
                assert slot["name"].partition(".")[0] in known, (node["type"], slot["name"])
        outputs = list(zip(info["output_name"], info["output"], strict=True))
        # Older hosts lack some outputs of newer ones, which no link may need.
        used = 1 + max((place for place, output in enumerate(node["outputs"]) if output["links"]), default=-1)
        known_outputs = [(output["name"], output["type"]) for output in node["outputs"]]
        assert used <= len(outputs) <= len(known_outputs)
        assert known_outputs[: len(outputs)] == outputs
        values = node.get("widgets_values", [])
        drawn = widgets(info, values)
        assert [value for _, value in drawn[: len(values)]] == values
        # Older hosts lack some optional widgets of newer ones: a file may leave the last ones to their defaults.
        assert {name for name, _ in drawn[len(values) :]} <= set(info["input"].get("optional", {}))


@every_file
def test_the_host_accepts_it(
    path: Path, client: Client, server: Server, object_info: dict[str, Any], real_model: None
) -> None:
    skip_if_unknown(path, object_info)
    shutil.copyfile(INPUT, server.input_folder / INPUT.name)
    prompt_id = client.queue(to_prompt(read(path), object_info))
    client.drop(prompt_id)


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


def frames_of(run: Run, server: Server) -> np.ndarray[Any, Any]:
    """All frames of the only video that a run put out, (frames, height, width, 3)."""
    files = [file for output in run.outputs.values() for file in output.get("images", ())]
    (video,) = (file for file in files if file["filename"].endswith(".mp4"))
    return iio.imread(server.output_folder / video["subfolder"] / video["filename"], plugin="pyav")


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["80MiB", "10MiB"])
def test_little_memory_gives_the_video_that_much_memory_gives(
    budget: str, client: Client, server: Server, object_info: dict[str, Any]
) -> None:
    shutil.copyfile(INPUT, server.input_folder / INPUT.name)
    prompt = to_prompt(read(PACK / "workflows" / "i2v_compare.json"), object_info)
    for node in prompt.values():
        if node["inputs"].get("budget") == "80MiB":
            node["inputs"]["budget"] = budget
        if node["class_type"] == "I2VChunkedSampler":
            node["inputs"]["steps"] = 3
    run = client.run(prompt)
    reports = [output["text"][0] for output in run.outputs.values() if "i2v_plan" in output]
    assert sorted("denoiser layers run unchunked" in report for report in reports) == [False, True]
    much, little, difference = np.split(frames_of(run, server)[:, :, : 3 * 96 + 8], [98, 198], axis=2)
    assert much.std() > 20
    assert np.abs(much[:, :, :96].astype(int) - little[:, :, 2:98]).mean() < 3, "more than compression"
    assert difference[:, :, 4:].max() < 24, "it is not black"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CARDS_FILES.values(), "i2v_svd", "i2v_wan_5b", "i2v_wan_14b"])
def test_a_workflow_for_real_weights_runs_with_a_small_model(
    name: str, client: Client, server: Server, object_info: dict[str, Any], real_model: None
) -> None:
    shutil.copyfile(INPUT, server.input_folder / INPUT.name)
    prompt = to_prompt(read(PACK / "workflows" / f"{name}.json"), object_info)
    for node in prompt.values():
        if node["class_type"] == "I2VVRAMBudget":
            node["inputs"] |= {"width": 64, "height": 64, "frames": 5}
        if node["class_type"] == "I2VChunkedSampler":
            node["inputs"]["steps"] = 1
    assert frames_of(client.run(prompt), server).shape == (5, 64, 64, 3)


def test_the_workflow_of_wan_fits_its_card_as_its_note_says() -> None:
    nodes = {node["type"]: node for node in read(PACK / "workflows" / "i2v_wan_5b.json")["nodes"]}
    width, height, frames, guidance, *_ = nodes["I2VVRAMBudget"]["widgets_values"]
    plan = plan_for_card(6, width, height, frames, guidance, model="wan2.2-ti2v-5b")
    note = nodes["MarkdownNote"]["widgets_values"][0]
    assert f"a peak of {plan.peak_bytes / GIB:.2f} GiB in {plan.binding_stage.stage.value}" in note
    assert f"takes {plan.predictions[1].peak_bytes / GIB:.2f} GiB" in note
    assert plan.sample.settings.streamed


def test_the_workflow_of_a_quantised_wan_fits_its_card_as_its_note_says() -> None:
    nodes = {node["type"]: node for node in read(PACK / "workflows" / "i2v_wan_14b.json")["nodes"]}
    width, height, frames, guidance, *_ = nodes["I2VVRAMBudget"]["widgets_values"]
    plan = plan_for_card(8, width, height, frames, guidance, model="wan2.1-i2v-14b", weights="Q4_K_M")
    note, (_, file) = nodes["MarkdownNote"]["widgets_values"][0], nodes["I2VLoader"]["widgets_values"]
    assert plan.binding_stage.stage is Stage.SAMPLE
    assert f"a peak of {plan.peak_bytes / GIB:.2f} GiB in sampling" in note
    assert f"`{file}`" in note
    model_bytes = loaded_bytes(plan.request.architecture, torch.float16)
    beside_bytes = max(stage.host_bytes for stage in plan.predictions)
    assert f"take {model_bytes / GIB:.0f} GiB of RAM" in note
    assert f"and {beside_bytes / GIB:.0f} GiB more" in note
    assert plan.sample.settings.streamed


@pytest.mark.parametrize(("gigabytes", "name"), CARDS_FILES.items())
def test_a_workflow_for_a_card_fits_it_as_its_note_says(gigabytes: int, name: str) -> None:
    """By what such a card has free, not by what its box says."""
    nodes = {node["type"]: node for node in read(PACK / "workflows" / f"{name}.json")["nodes"]}
    width, height, frames, guidance, *_ = nodes["I2VVRAMBudget"]["widgets_values"]
    note = nodes["MarkdownNote"]["widgets_values"][0]
    plan = plan_for_card(gigabytes, width, height, frames, guidance)
    predicted = re.search(r"a peak of (\d+\.\d\d) GiB in (\w+)", note)
    assert predicted
    assert f"{plan.peak_bytes / GIB:.2f}" == predicted[1]
    assert plan.binding_stage.stage.value == predicted[2].replace("sampling", "sample")
    assert not plan.sample.settings.streamed
    assert f"--width {width} --height {height} --frames {frames} --vram {gigabytes - 0.75}GiB" in note
    longest = re.search(r"Up to (\d+) frames fit with the weights on the card", note)
    assert longest
    assert not plan_for_card(gigabytes, width, height, int(longest[1]), guidance).sample.settings.streamed


def plan_for_card(
    gigabytes: int, width: int, height: int, frames: int, guidance: bool, model: str = REAL_MODEL, weights: str = ""
) -> Plan:
    card = CARDS[f"{gigabytes} GB"]
    size = VideoSize(width_pixels=width, height_pixels=height, frames=frames)
    architecture = bundled_architecture(model)
    architecture = with_weights(architecture, weights) if weights else architecture
    request = Request(architecture=architecture, size=size, guidance=guidance, precision="fp16")
    return make_plan(request, Budget(free_bytes=card.free_bytes, limit_bytes=card.free_bytes), card.facts)
