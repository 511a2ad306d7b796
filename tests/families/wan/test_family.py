"""Wan's folders, facts and bundled architectures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from i2v_core.chunking import ChunkSettings
from i2v_core.decoding import TilingSettings
from i2v_core.errors import BadInputError, ModelFolderError
from i2v_core.families import VideoSize, bundled_architecture, family_of, load_model, read_architecture
from i2v_core.placement.precision import compute_dtypes
from i2v_core.planning.memory_table import memory_table
from i2v_core.planning.plan import DecodeSettings, EncodeSettings, SampleSettings
from i2v_core.planning.predict import predict_decode, predict_encode, predict_sample
from i2v_core.planning.request import Request
from i2v_core.planning.trace import loaded_bytes, trace_denoiser, weights_bytes
from i2v_core.units import GIB, MIB

BUNDLED = ("wan2.1-i2v-14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b")
STREAMED = SampleSettings(
    compute_dtype=torch.bfloat16, batched_guidance=False, workspace_bytes=256 * MIB, streamed=True
)


def edited(source: Path, target: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a model folder with one JSON file changed."""
    shutil.copytree(source, target)
    content = json.loads((target / name).read_text())
    change(content)
    (target / name).write_text(json.dumps(content))
    return target


def test_the_folder_says_which_family_and_which_components(wan_folder: Path) -> None:
    model = load_model(wan_folder)
    family = family_of(model.architecture)
    begins = "ti2v" in wan_folder.name
    assert family.facts.name == ("wan-ti2v" if begins else "wan")
    expected = {"transformer", "vae", "text_encoder"}
    expected |= {"transformer_2"} if "a14b" in wan_folder.name else set()
    expected |= {"image_encoder"} if "2.1" in wan_folder.name else set()
    assert set(model.modules) == expected
    assert read_architecture(wan_folder) == model.architecture
    boundaries = [(it.component, it.from_timestep) for it in family.denoisers(model.architecture)]
    if "a14b" in wan_folder.name:
        assert boundaries == [("transformer", 900.0), ("transformer_2", float("-inf"))]
    else:
        assert boundaries == [("transformer", float("-inf"))]


def test_text_to_video_folders_are_not_taken_for_it(wan_folder: Path, tmp_path: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index.update({"_class_name": "WanPipeline", "expand_timesteps": False})

    with pytest.raises(ModelFolderError, match="not a model that this pack knows"):
        load_model(edited(wan_folder, tmp_path / "t2v", "model_index.json", change))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("vae/config.json", "latents_mean", [0.0]),
        ("vae/config.json", "latents_std", None),
        ("vae/config.json", "z_dim", 4),
        ("transformer/config.json", "text_dim", "wide"),
    ],
)
def test_configs_that_make_no_model_are_refused(
    wan_folder: Path, tmp_path: Path, name: str, key: str, value: object
) -> None:
    with pytest.raises(ModelFolderError):
        read_architecture(edited(wan_folder, tmp_path / "damaged", name, lambda config: config.update({key: value})))


def test_a_folder_that_lacks_its_second_expert_is_refused(tmp_path: Path, wan_folder: Path) -> None:
    index = json.loads((wan_folder / "model_index.json").read_text())
    folder = edited(wan_folder, tmp_path / "one", "model_index.json", lambda it: it.update({"boundary_ratio": 0.9}))
    if index["boundary_ratio"] is not None:
        (folder / "transformer_2" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match="transformer_2"):
        load_model(folder)


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize(("frames", "nearest"), [(80, "77 or 81"), (82, "81 or 85"), (2, "1 or 5")])
def test_frames_that_are_not_four_k_and_one_are_refused_with_the_two_nearest(
    name: str, frames: int, nearest: str
) -> None:
    with pytest.raises(BadInputError, match=f"use {nearest}"):
        family_of(bundled_architecture(name)).facts.check(VideoSize(width_pixels=832, height_pixels=480, frames=frames))


@pytest.mark.parametrize(("name", "multiple"), [("wan2.1-i2v-14b", 16), ("wan2.2-ti2v-5b", 32)])
def test_sizes_that_make_no_whole_patches_are_refused(name: str, multiple: int) -> None:
    facts = family_of(bundled_architecture(name)).facts
    with pytest.raises(BadInputError, match=f"not divisible by {multiple}"):
        facts.check(VideoSize(width_pixels=832 + 8, height_pixels=480, frames=81))


def test_the_published_models_weights() -> None:
    """Counts bf16 weights, with norms, time embedding and positions in fp32."""
    sizes = {"wan2.1-i2v-14b": 30.6, "wan2.2-i2v-a14b": 26.7, "wan2.2-ti2v-5b": 9.34}
    for name, expected_gib in sizes.items():
        architecture = bundled_architecture(name)
        of_transformer = weights_bytes(architecture, "transformer", torch.bfloat16)
        assert of_transformer / GIB == pytest.approx(expected_gib, rel=0.01)
    two = bundled_architecture("wan2.2-i2v-a14b")
    assert loaded_bytes(two, torch.bfloat16) > 2 * weights_bytes(two, "transformer", torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "size", "most_gib"),
    [
        ("wan2.1-i2v-14b", (1280, 720, 81), 3.2),
        ("wan2.1-i2v-14b", (832, 480, 81), 2.0),
        ("wan2.2-i2v-a14b", (1280, 720, 81), 3.2),
        ("wan2.2-ti2v-5b", (1280, 704, 121), 1.2),
    ],
)
def test_the_published_models_fit_small_cards(name: str, size: tuple[int, int, int], most_gib: float) -> None:
    """Predicts all stages with weights streamed, and encode and decode with feature maps offloaded."""
    width, height, frames = size
    request = Request(
        architecture=bundled_architecture(name),
        size=VideoSize(width_pixels=width, height_pixels=height, frames=frames),
        precision="bf16",
    )
    assert predict_sample(request, STREAMED).peak_bytes <= most_gib * GIB
    tiling = TilingSettings(chunk_size=4, tile_pixels=128, maps_bytes=GIB)
    decode = DecodeSettings(tiling=tiling, streamed=True)
    assert predict_decode(request, decode, torch.bfloat16).peak_bytes <= 1.3 * GIB
    encode = EncodeSettings(tiling=tiling, streamed=True)
    assert predict_encode(request, encode, torch.bfloat16).peak_bytes <= 1.3 * GIB


def test_the_memory_table_has_a_row_for_each_size() -> None:
    rows = memory_table(bundled_architecture("wan2.1-i2v-14b"), torch.bfloat16)
    assert [str(row.size) for row in rows] == ["832×480×81", "1280×720×81"]
    for row in rows:
        assert row.streamed_bytes < row.resident_bytes < row.stock_bytes


def test_tensors_that_diffusers_keeps_in_fp32_stay_in_fp32() -> None:
    trace = trace_denoiser(
        bundled_architecture("wan2.1-i2v-14b"),
        VideoSize(width_pixels=64, height_pixels=64, frames=5),
        1,
        torch.bfloat16,
        ChunkSettings(workspace_bytes=MIB),
    )
    model: Any = trace.module
    dtype_of = compute_dtypes(model, torch.bfloat16)
    kept = [model.rope.freqs_cos, model.scale_shift_table, model.blocks[0].scale_shift_table]
    kept += [model.blocks[0].norm2.weight, model.condition_embedder.time_embedder.linear_1.weight]
    assert {tensor.dtype for tensor in kept} == {dtype_of(tensor) for tensor in kept} == {torch.float32}
    assert model.blocks[0].attn1.to_q.weight.dtype is dtype_of(model.blocks[0].attn1.norm_q.weight) is torch.bfloat16
