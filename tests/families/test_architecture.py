"""Architectures of model folders, read without weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from i2v_core.errors import ModelFolderError
from i2v_core.families import bundled_architecture, bundled_models, family_of, load_model, read_architecture
from i2v_core.families.folder import read_json
from i2v_core.planning.trace import loaded_bytes
from i2v_core.sampling.schedulers import SCHEDULERS
from tests.subjects import Subject


def test_it_is_the_loaded_models(subject: Subject, subject_folder: Path) -> None:
    architecture = read_architecture(subject_folder)
    assert architecture == load_model(subject_folder).architecture
    assert architecture.family == subject.family.facts.name


def test_it_needs_no_weights(subject_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(subject_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert read_architecture(folder) == read_architecture(subject_folder)


def test_a_missing_config_is_named(subject_folder: Path, tmp_path: Path) -> None:
    architecture = read_architecture(subject_folder)
    denoiser = family_of(architecture).denoisers(architecture)[0].component
    for config in (f"{denoiser}/config.json", "scheduler/scheduler_config.json"):
        folder = tmp_path / denoiser / Path(config).stem
        shutil.copytree(subject_folder, folder)
        (folder / config).unlink()
        with pytest.raises(ModelFolderError, match=config):
            read_architecture(folder)


@pytest.mark.parametrize("subject", ["i2vgen-xl", "svd"], indirect=True)
def test_a_folder_without_an_index_is_known_by_its_denoiser(
    subject: Subject, subject_folder: Path, tmp_path: Path
) -> None:
    """Tests folders whose index names no pipeline."""
    folder = tmp_path / "model"
    shutil.copytree(subject_folder, folder)
    (folder / "model_index.json").unlink()
    assert read_architecture(folder).family == subject.name


@pytest.mark.parametrize("model", bundled_models())
def test_every_bundled_architecture_makes_all_components(model: str) -> None:
    """Builds every component on the meta device."""
    architecture = bundled_architecture(model)
    family = family_of(architecture)
    assert loaded_bytes(architecture, torch.float16) > 0
    assert {family.facts.scheduler("auto").name} <= set(SCHEDULERS)


def test_configs_that_do_not_fit_each_other_are_refused(tmp_path: Path, tiny_models: dict[str, Any]) -> None:
    tiny_models["svd"](tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    changed = read_json(config) | {"projection_class_embeddings_input_dim": 32}
    config.write_text(json.dumps(changed), "utf-8")
    with pytest.raises(ModelFolderError, match="takes 32 values"):
        read_architecture(tmp_path / "model")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="not a model"):
        read_architecture(tmp_path)
