"""Latent files, saved and loaded; files that are not latents are refused, whatever they claim to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from i2v_core.errors import BadInputError, FileError
from i2v_core.families import VideoSize, bundled_architecture
from i2v_core.latent_file import load_latent, save_latent
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.units import GIB

SIZE = VideoSize(width_pixels=128, height_pixels=64, frames=3)
SAMPLES = torch.arange(3 * 4 * 8 * 16, dtype=torch.float32).reshape(3, 4, 8, 16)


@pytest.fixture(scope="module")
def plan() -> Plan:
    request = Request(architecture=bundled_architecture("i2vgen-xl"), size=SIZE, guidance=False)
    return make_plan(request, Budget(free_bytes=16 * GIB), device_facts(torch.device("cpu")))


def test_what_was_saved_is_loaded(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "folder" / "a.latent"
    saved = save_latent(path, SAMPLES.half(), plan, {"workflow": "{}"})
    samples, facts = load_latent(path)
    assert torch.equal(samples, SAMPLES.half().float())
    assert facts == saved
    assert (facts.size, facts.family, facts.guidance) == (SIZE, "i2vgen-xl", False)
    assert facts.fingerprint == plan.request.architecture.fingerprint
    assert [file.name for file in path.parent.iterdir()] == ["a.latent"]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["workflow"] == "{}"
        assert set(file.keys()) == {"latent_tensor", "latent_format_version_0"}


def test_the_size_is_the_latents_own(tmp_path: Path, plan: Plan) -> None:
    facts = save_latent(tmp_path / "a", torch.zeros(7, 4, 12, 10), plan)
    assert str(facts.size) == "80×96×7"


def test_a_loaded_latent_does_not_depend_on_its_file(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.latent"
    save_latent(path, SAMPLES, plan)
    samples, _ = load_latent(path)
    path.write_bytes(b"")
    assert torch.equal(samples, SAMPLES)


@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (1, 4, 3, 8, 8), (0, 4, 8, 8)])
def test_a_latent_of_another_model_is_not_saved(shape: tuple[int, ...], tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(BadInputError) as error:
        save_latent(tmp_path / "a.latent", torch.zeros(shape), plan)
    assert str(shape) in error.value.problem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("scaled", [False, True])
def test_the_hosts_own_files_are_loaded(scaled: bool, tmp_path: Path) -> None:
    path = tmp_path / "host.latent"
    tensors = {"latent_tensor": SAMPLES} | ({} if scaled else {"latent_format_version_0": torch.tensor([])})
    safetensors.torch.save_file(tensors, path, {"prompt": "{}"})
    samples, facts = load_latent(path)
    torch.testing.assert_close(samples, SAMPLES / 0.18215 if scaled else SAMPLES)
    assert (facts.size, facts.family) == (SIZE, "")


def empty(good: bytes) -> bytes:
    return b""


def shorter_than_a_length(good: bytes) -> bytes:
    return good[:5]


def only_a_length(good: bytes) -> bytes:
    return good[:8]


def cut_in_the_header(good: bytes) -> bytes:
    return good[:100]


def cut_in_the_data(good: bytes) -> bytes:
    return good[:-1]


def one_byte_more(good: bytes) -> bytes:
    return good + b"\0"


def a_header_of_two_to_the_63(good: bytes) -> bytes:
    return (1 << 63).to_bytes(8, "little") + good[8:]


def text(good: bytes) -> bytes:
    return b"this is no latent, but it is long enough to have a header " * 20


def a_pickle(good: bytes) -> bytes:
    return b"\x80\x04\x95" + good


def a_tensor_larger_than_the_file(good: bytes) -> bytes:
    return _with_header({"latent_tensor": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})


def no_json(good: bytes) -> bytes:
    return (8).to_bytes(8, "little") + b"{{{{{{{{" + good


def other_tensors(good: bytes) -> bytes:
    return safetensors.torch.save({"unet.weight": torch.zeros(2)})


def a_picture_too_many_dimensions(good: bytes) -> bytes:
    return safetensors.torch.save({"latent_tensor": torch.zeros(1, 16, 2, 8, 8)})


def another_version(good: bytes) -> bytes:
    return safetensors.torch.save({"latent_tensor": SAMPLES}, {"i2v_latent": json.dumps({"version": 99})})


def garbled_facts(good: bytes) -> bytes:
    return safetensors.torch.save({"latent_tensor": SAMPLES}, {"i2v_latent": "[1]"})


def _with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (empty, "cut off"),
        (shorter_than_a_length, "cut off"),
        (only_a_length, "cut off"),
        (cut_in_the_header, "cut off"),
        (cut_in_the_data, "damaged"),
        (one_byte_more, "damaged"),
        (a_header_of_two_to_the_63, "cut off"),
        (text, "cut off"),
        (a_pickle, "cut off"),
        (a_tensor_larger_than_the_file, "damaged"),
        (no_json, "damaged"),
        (other_tensors, "unet.weight"),
        (a_picture_too_many_dimensions, "(1, 16, 2, 8, 8)"),
        (another_version, "version 99"),
        (garbled_facts, "does not say properly"),
    ],
)
def test_what_is_no_latent_is_refused(spoil: Callable[[bytes], bytes], said: str, tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "a.latent"
    save_latent(path, SAMPLES, plan)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(FileError) as error:
        load_latent(path)
    assert said in error.value.problem
    assert str(path) in error.value.problem


def test_a_missing_file_or_a_folder_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.latent", tmp_path):
        with pytest.raises(FileError, match="cannot be read"):
            load_latent(path)
