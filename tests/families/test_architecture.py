"""The architecture of a model folder, read without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from i2v_core.errors import ModelFolderError
from i2v_core.families import load_model, read_architecture


def test_it_is_the_loaded_models(tiny_folder: Path) -> None:
    assert read_architecture(tiny_folder) == load_model(tiny_folder).architecture


def test_it_needs_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert read_architecture(folder) == read_architecture(tiny_folder)


@pytest.mark.parametrize("config", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_config_is_named(tiny_folder: Path, tmp_path: Path, config: str) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(tiny_folder, folder)
    (folder / config).unlink()
    with pytest.raises(ModelFolderError, match=config):
        read_architecture(folder)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="not a model"):
        read_architecture(tmp_path)
