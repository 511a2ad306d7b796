"""Whatever a user gets wrong is answered with what is wrong, its value and the remedy; and the host goes on."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from comfy_host.client import Client, ExecutionError, PromptRefusedError
from comfy_host.server import Server

REFUSED = {
    "no such model": ({"loader": {"model": "nowhere"}}, "loader", "value_not_in_list"),
    "no frames": ({"budget": {"frames": 0}}, "budget", "value_smaller_than_min"),
    "a negative reserve": ({"budget": {"reserve_gib": -1.0}}, "budget", "value_smaller_than_min"),
    "an unknown precision": ({"budget": {"precision": "fp4"}}, "budget", "value_not_in_list"),
    "no steps": ({"sampler": {"steps": 0}}, "sampler", "value_smaller_than_min"),
    "cfg out of range": ({"sampler": {"cfg": 1000.0}}, "sampler", "value_bigger_than_max"),
    "a model for a conditioning": ({"sampler": {"conditioning": ["loader", 0]}}, "sampler", "return_type_mismatch"),
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


@pytest.mark.parametrize("spoil", [remove_files, truncate, only_pickles, garbled_config])
def test_a_spoiled_model_is_refused_with_the_files_named(
    spoil: Callable[[Path], list[str]], client: Client, server: Server, make_prompt: Any
) -> None:
    with spoiled_model(server, spoil) as (name, said):
        assert_fails(client, make_prompt(loader={"model": name}), "I2VLoader", "ModelFolderError", said)


def test_after_all_that_a_good_prompt_runs(client: Client, make_prompt: Any) -> None:
    run = client.run(make_prompt(sampler={"seed": 99}))
    assert len(run.outputs["save"]["images"]) == 4
