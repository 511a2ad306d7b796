"""A user's mistake is answered with the problem, its value and the remedy; and the host goes on."""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host.client import Client, ExecutionError, PromptRefusedError
from comfy_host.server import PACK_FOLDER, Server
from comfy_host.setup import PACK
from PIL import Image

REFUSED = {
    "no such model": ({"loader": {"model": "nowhere"}}, "loader", "value_not_in_list"),
    "no frames": ({"budget": {"frames": 0}}, "budget", "value_smaller_than_min"),
    "a negative reserve": ({"budget": {"reserve_gib": -1.0}}, "budget", "value_smaller_than_min"),
    "an unknown precision": ({"budget": {"precision": "fp4"}}, "budget", "value_not_in_list"),
    "no steps": ({"sampler": {"steps": 0}}, "sampler", "value_smaller_than_min"),
    "cfg out of range": ({"sampler": {"cfg": 1000.0}}, "sampler", "value_bigger_than_max"),
    "a model for a conditioning": ({"sampler": {"conditioning": ["loader", 0]}}, "sampler", "return_type_mismatch"),
    "a way out for a model": ({"loader": {"model": "../../etc"}}, "loader", "value_not_in_list"),
    "an absolute path for a model": ({"loader": {"model": "/etc"}}, "loader", "value_not_in_list"),
    "no number of frames": ({"budget": {"frames": float("nan")}}, "budget", "invalid_input_type"),
    "a text for a width": ({"budget": {"width": "wide"}}, "budget", "invalid_input_type"),
    "a negative tile": ({"decode": {"tile_size": -8}}, "decode", "value_smaller_than_min"),
}
"""Changes to a good prompt; the node that the host refuses, and why."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_host_can_see_is_refused_before_it_runs(case: str, client: Client, make_prompt: Any) -> None:
    changes, node, kind = REFUSED[case]
    with pytest.raises(PromptRefusedError) as refusal:
        client.run(make_prompt(**changes))
    assert list(refusal.value.node_errors) == [node]
    assert [error["type"] for error in refusal.value.node_errors[node]["errors"]] == [kind]


FAILS = {
    "a width between": ({"budget": {"width": 68}}, "I2VVRAMBudget", "BadInputError", ["68", "64 or 72"]),
    "a height between": ({"budget": {"height": 100}}, "I2VVRAMBudget", "BadInputError", ["100", "96 or 104"]),
    "no budget": ({"budget": {"budget": "0"}}, "I2VVRAMBudget", "BadInputError", ["'0'", "above zero"]),
    "a budget of words": ({"budget": {"budget": "banana"}}, "I2VVRAMBudget", "BadInputError", ["'banana'", "6GiB"]),
    "a budget below zero": ({"budget": {"budget": "-2GiB"}}, "I2VVRAMBudget", "BadInputError", ["'-2GiB'", "6GiB"]),
    "too small a tile": ({"decode": {"tile_size": 16}}, "I2VVAETiledDecode", "BadInputError", ["16", "at least 32"]),
    "an overlap": ({"decode": {"overlap": 40}}, "I2VVAETiledDecode", "BadInputError", ["40", "no seams"]),
    "cfg without guidance": (
        {"budget": {"guidance": False}, "sampler": {"cfg": 7.0}},
        "I2VChunkedSampler",
        "BadInputError",
        ["7.0", "turn guidance on"],
    ),
    "a cfg that is no number": (
        {"sampler": {"cfg": float("nan")}},
        "I2VChunkedSampler",
        "BadInputError",
        ["cfg is nan, which is not a finite number"],
    ),
    "a number for a model": ({"budget": {"model": 5}}, "I2VVRAMBudget", "BadInputError", ["model is 5", "I2V Loader"]),
    "a text for a plan": ({"encode": {"plan": "x"}}, "I2VEncode", "BadInputError", ["plan is 'x'", "VRAM Budget"]),
    "an object for a latent": (
        {"decode": {"latent": {"samples": 1}}},
        "I2VVAETiledDecode",
        "BadInputError",
        ["latent is of type dict", "I2V Load Latent"],
    ),
    "nothing for an image": ({"encode": {"image": None}}, "I2VEncode", "BadInputError", ["image is None", "IMAGE"]),
    "half of a character": (
        {"encode": {"prompt": "a\ud800"}},
        "I2VEncode",
        "BadInputError",
        [r"'a\ud800'", "not text"],
    ),
    "a book for a prompt": (
        {"encode": {"prompt": "a " * 50_000}},
        "I2VEncode",
        "BadInputError",
        ["100,000", "too long"],
    ),
}
"""Changes to a good prompt; the node that fails, its error, and what the message has to say."""


@pytest.mark.parametrize("case", FAILS)
def test_what_only_the_node_can_see_fails_with_a_remedy(case: str, client: Client, make_prompt: Any) -> None:
    changes, node_type, error_type, said = FAILS[case]
    assert_fails(client, make_prompt(**changes), node_type, error_type, said)


def assert_fails(client: Client, prompt: Any, node_type: str, error_type: str, said: list[str]) -> ExecutionError:
    with pytest.raises(ExecutionError) as failure:
        client.run(prompt)
    assert failure.value.node_type == node_type
    assert failure.value.exception_type.rpartition(".")[2] == error_type
    for words in [*said, "Remedy: "]:
        assert words in failure.value.message
    return failure.value


def test_what_a_node_of_any_type_gives_is_held_against_the_schema(client: Client, make_prompt: Any) -> None:
    def through_switch(*source: Any) -> dict[str, Any]:
        prompt = make_prompt(sampler={"steps": ["any", 0]})
        inputs = {"switch": True, "on_true": list(source), "on_false": list(source)}
        prompt["any"] = {"class_type": "ComfySwitchNode", "inputs": inputs}
        prompt["latent"] = {"class_type": "I2VLoadLatent", "inputs": {"file": "demo (bundled)"}}
        return prompt

    if "ComfySwitchNode" not in client.object_info():
        pytest.skip("this host has no such node")
    for source, said in ((("budget", 1), "not a whole number"), (("picture", 0), "a tensor of shape (1, 64, 96, 3)")):
        assert_fails(client, through_switch(*source), "I2VChunkedSampler", "BadInputError", [said])
    client.run(through_switch("budget", 2))


def test_a_strip_for_a_picture_is_refused(client: Client, server: Server, make_prompt: Any) -> None:
    Image.new("RGB", (1, 8000)).save(server.input_folder / "strip.png")
    prompt = make_prompt(picture={"image": "strip.png"}, budget={"width": 512, "budget": "8GiB"})
    assert_fails(client, prompt, "I2VEncode", "BadInputError", ["1×8000", "next to nothing"])


def test_what_cannot_fit_is_refused_with_the_nearest_that_does(client: Client, make_prompt: Any) -> None:
    def plan_only(**size: int) -> dict[str, Any]:
        prompt = make_prompt(budget={"frames": 16, "budget": "2MiB", **size})
        return {name: prompt[name] for name in ("loader", "budget")}

    too_large = plan_only(width=128, height=128)
    failure = assert_fails(client, too_large, "I2VVRAMBudget", "NothingFitsError", ["128×128×16", "does not fit"])
    _, _, remedy = failure.message.partition("Remedy: ")
    smaller = re.search(r"(\d+)×(\d+)", remedy)
    assert smaller, "no size that would fit is named"
    run = client.run(plan_only(width=int(smaller[1]), height=int(smaller[2])))
    assert max(stage["peak_bytes"] for stage in run.outputs["budget"]["i2v_plan"][0]["stages"]) <= 2 << 20


def test_a_latent_of_another_size_is_refused(client: Client, make_prompt: Any) -> None:
    prompt = make_prompt(decode={"latent": ["other", 0]})
    prompt["other"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 64, "batch_size": 4}}
    assert_fails(client, prompt, "I2VVAETiledDecode", "PlanMismatchError", ["16×8", "8×8"])


def test_a_latent_of_another_model_is_refused(client: Client, make_prompt: Any) -> None:
    prompt = make_prompt(decode={"latent": ["other", 0]})
    prompt["other"] = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}}
    assert_fails(client, prompt, "I2VVAETiledDecode", "BadInputError", ["(4, 16, 8, 8)", "Chunked Sampler"])


def test_a_conditioning_of_another_plan_is_refused(client: Client, make_prompt: Any) -> None:
    prompt = make_prompt(sampler={"plan": ["other", 0]})
    prompt["other"] = make_prompt(budget={"width": 128})["budget"]
    assert_fails(client, prompt, "I2VChunkedSampler", "PlanMismatchError", ["the same VRAM Budget"])


def remove_files(folder: Path) -> list[str]:
    missing = ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
    for name in missing:
        (folder / name).unlink()
    return missing


def truncate(folder: Path) -> list[str]:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return ["unet/diffusion_pytorch_model.safetensors", "damaged"]


def only_pickles(folder: Path) -> list[str]:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    return ["unet/diffusion_pytorch_model.bin", "pickle", "refused"]


def garbled_config(folder: Path) -> list[str]:
    (folder / "unet" / "config.json").write_text("{", "utf-8")
    return ["config.json", "JSON"]


def empty_weights(folder: Path) -> list[str]:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    return ["vae/diffusion_pytorch_model.safetensors", "damaged"]


def renamed_pickle(folder: Path) -> list[str]:
    torch.save({"x": torch.zeros(4)}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    return ["unet/diffusion_pytorch_model.safetensors", "damaged"]


def hostile_header(folder: Path) -> list[str]:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(struct.pack("<Q", 2**63) + weights.read_bytes()[8:])
    return ["unet/diffusion_pytorch_model.safetensors", "damaged"]


SPOILS = [remove_files, truncate, only_pickles, garbled_config, empty_weights, renamed_pickle, hostile_header]


@contextmanager
def spoiled_model(server: Server, spoil: Callable[[Path], list[str]]) -> Iterator[tuple[str, list[str]]]:
    """A copy of the small model after `spoil`: its name, and what the error has to say."""
    models = server.models_folder / "diffusers"
    folder = models / spoil.__name__
    shutil.copytree(models / "tiny", folder)
    try:
        yield folder.name, spoil(folder)
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_spoiled_model_is_refused_with_the_files_named(
    spoil: Callable[[Path], list[str]], client: Client, server: Server, make_prompt: Any
) -> None:
    with spoiled_model(server, spoil) as (name, said):
        assert_fails(client, make_prompt(loader={"model": name}), "I2VLoader", "ModelFolderError", said)


def inputs_in_the_table() -> dict[str, set[str]]:
    """The inputs that docs/bad-input.md speaks of, by their node's name."""
    _, *sections = (PACK / "docs" / "bad-input.md").read_text("utf-8").split("\n## ")
    rows = {section.partition("\n")[0]: re.findall(r"^\| (`.+?) \|", section, re.MULTILINE) for section in sections}
    return {node: {name.strip("`") for row in found for name in row.split(", ")} for node, found in rows.items()}


def test_the_table_in_the_docs_has_every_input_and_no_other(object_info: dict[str, Any]) -> None:
    own = [node for node in object_info.values() if node["python_module"] == f"custom_nodes.{PACK_FOLDER}"]
    expected = {
        node["display_name"]: {name for section in ("required", "optional") for name in node["input"].get(section, {})}
        for node in own
    }
    expected["POST /i2v_budget/plan"] = expected["VRAM Budget"] | {"fixes", "transformer_file", "low_noise_file"}
    assert inputs_in_the_table() == expected


def test_after_all_that_a_good_prompt_runs(client: Client, make_prompt: Any) -> None:
    run = client.run(make_prompt(sampler={"seed": 99}))
    assert len(run.outputs["save"]["images"]) == 4
