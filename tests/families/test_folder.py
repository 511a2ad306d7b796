"""Model folders: which load, and the one error that names all faults of others."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from i2v_core.errors import ModelFolderError
from i2v_core.families import load_model

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Copies the small model, for a test to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_weights_stay_in_host_memory_in_their_stored_dtype(
    tmp_path: Path, save_tiny_model: Callable[..., None]
) -> None:
    save_tiny_model(tmp_path / "half", dtype=torch.float16)
    model = load_model(tmp_path / "half")
    for module in model.modules.values():
        assert next(module.parameters()).dtype == torch.float16
        assert {tensor.device.type for tensor in module.parameters()} == {"cpu"}
        assert not module.training


@pytest.mark.parametrize(
    "save", [{"variant": "fp16"}, {"max_shard_size": "40KB"}, {"variant": "fp16", "max_shard_size": "40KB"}]
)
def test_variants_and_shards_load_as_the_plain_file_does(
    tmp_path: Path, tiny_folder: Path, save_tiny_model: Callable[..., None], save: dict[str, str]
) -> None:
    save_tiny_model(tmp_path / "saved", **save)
    assert not (tmp_path / "saved" / UNET).exists()
    plain, loaded = load_model(tiny_folder), load_model(tmp_path / "saved")
    for name, module in plain.modules.items():
        expected, found = module.state_dict(), loaded.modules[name].state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_one_error_names_every_missing_file(folder: Path) -> None:
    (folder / UNET).unlink()
    (folder / "vae" / "config.json").unlink()
    shutil.rmtree(folder / "tokenizer")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelFolderError) as raised:
        load_model(folder)
    for file in (UNET, "vae/config.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"):
        assert file in str(raised.value)


def test_a_missing_shard_is_named(tmp_path: Path, save_tiny_model: Callable[..., None]) -> None:
    save_tiny_model(tmp_path / "sharded", max_shard_size="40KB")
    shard = sorted((tmp_path / "sharded" / "unet").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelFolderError, match=shard.name):
        load_model(tmp_path / "sharded")


def test_pickles_are_refused(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="pickle"):
        load_model(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda _: b"",
        lambda _: b"not a model",
        lambda _: b"PK\x03\x04" + b"\0" * 100,
        lambda content: struct.pack("<Q", 2**63) + content[8:],
        lambda content: struct.pack("<Q", 2**40) + content[8:],
    ],
    ids=["truncated", "empty", "text", "renamed", "header-2^63", "header-2^40"],
)
def test_damaged_weights_are_named_before_loading(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / UNET).write_bytes(damage((folder / UNET).read_bytes()))
    with pytest.raises(ModelFolderError, match=r"unet/diffusion_pytorch_model\.safetensors is damaged"):
        load_model(folder)


def test_weights_of_another_component_are_refused(folder: Path) -> None:
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", folder / UNET)
    with pytest.raises(ModelFolderError, match="I2VGenXLUNet"):
        load_model(folder)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "", "[" * 100_000, '{"steps": ' + "9" * 10_000 + "}"])
def test_a_config_that_is_no_json_object_is_named(folder: Path, content: str) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(content)
    with pytest.raises(ModelFolderError, match=r"scheduler_config\.json"):
        load_model(folder)


WRONG_CONFIGS = {
    "no size of the picture": ("feature_extractor/preprocessor_config.json", {"crop_size": None}),
    "a picture of no size": ("feature_extractor/preprocessor_config.json", {"crop_size": 0}),
    "colours of words": ("feature_extractor/preprocessor_config.json", {"image_mean": "red"}),
    "an unknown schedule": ("scheduler/scheduler_config.json", {"beta_schedule": None}),
    "no timesteps": ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
    "endless tokens": ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}),
    "no width": ("image_encoder/config.json", {"hidden_size": 0}),
    "an unknown dtype": ("image_encoder/config.json", {"dtype": []}),
    "no heads": ("unet/config.json", {"attention_head_dim": None, "num_attention_heads": None}),
}
"""A config file, and what is changed in it."""


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_configs_that_make_no_model_are_refused_when_they_are_read(folder: Path, case: str) -> None:
    name, changes = WRONG_CONFIGS[case]
    content = json.loads((folder / name).read_text("utf-8"))
    (folder / name).write_text(json.dumps(content | changes), "utf-8")
    with pytest.raises(ModelFolderError, match=r"make no model|does not load"):
        load_model(folder)


def test_a_damaged_vocabulary_is_named(folder: Path) -> None:
    (folder / "tokenizer" / "vocab.json").write_text('{"!": -1}', "utf-8")
    with pytest.raises(ModelFolderError, match="tokenizer"):
        load_model(folder)


@pytest.mark.parametrize("weight_map", [None, {}, ["a.safetensors"]])
def test_an_index_that_names_no_files_is_refused(folder: Path, weight_map: object) -> None:
    (folder / UNET).unlink()
    (folder / f"{UNET}.index.json").write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    with pytest.raises(ModelFolderError, match="names no weight files"):
        load_model(folder)


def test_an_index_does_not_lead_out_of_its_folder(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / UNET, outside)
    index = {"weight_map": {"conv_in.weight": "../../outside.safetensors"}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ModelFolderError, match=r"unet/outside\.safetensors is missing"):
        load_model(folder)


def test_a_folder_that_is_not_there_or_not_known(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFolderError, match="I2VGen-XL"):
        load_model(tmp_path / "empty")
