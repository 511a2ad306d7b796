"""Wan transformers from weight files: which are read, which stay quantised, and which are refused before loading."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from i2v_core.errors import BadInputError, MissingPackageError, ModelFolderError
from i2v_core.families import load_model, read_architecture
from i2v_core.memory.meter import rounded_bytes
from i2v_core.placement.quantized import quantized_weights
from i2v_core.planning.trace import skeleton, weights_bytes
from i2v_core.sampling.checkpoint import weights_identity
from tests.wan_files import (
    QuantizationType,
    published_name,
    read_by_diffusers,
    save_wan_of_blocks,
    tiny_transformer,
    with_one_removed,
    write_fp8,
    write_gguf,
)

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def wan(save_wan: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder of a small Wan 2.1 without its transformer's weights, and the transformer."""
    folder = tmp_path_factory.mktemp("wan")
    return folder, save_wan_of_blocks(save_wan, folder)["transformer"]


@pytest.fixture(scope="module")
def gguf_file(wan: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("file") / "wan-i2v-Q4_0.gguf", wan[1].state_dict())


def test_names_are_those_of_the_published_code(wan: tuple[Path, Any]) -> None:
    """Checks that the tests' own renaming is the inverse of diffusers'."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = list(wan[1].state_dict())
    converted = convert_wan_transformer_to_diffusers({published_name(name): name for name in names})
    assert converted == {name: name for name in names}


def test_the_header_tells_how_weights_will_be_stored(wan: tuple[Path, Any], gguf_file: Path) -> None:
    files = {"transformer": gguf_file}
    architecture = read_architecture(wan[0], files)
    assert architecture.stored_formats == ("Q4_0", "Q8_0")
    assert architecture != read_architecture(wan[0])
    model = load_model(wan[0], files)
    assert model.architecture == architecture
    loaded, predicted = (
        {name: part.storage_format for name, part in untyped.named_modules() if hasattr(part, "storage_format")}
        for untyped in cast("list[Any]", [model.modules["transformer"], skeleton(architecture, "transformer", BF16)])
    )
    assert loaded == predicted
    assert len(loaded) == sum(map(len, architecture.stored["transformer"].values()))
    for name, form in loaded.items():
        weight = model.modules["transformer"].get_submodule(name).weight
        assert weight.dtype is torch.uint8
        assert weight.nbytes == form.stored_bytes


def test_weights_take_their_bytes_in_the_file(wan: tuple[Path, Any], gguf_file: Path) -> None:
    """Most numbers take 4.5 bits in place of 16."""
    in_place = weights_bytes(read_architecture(wan[0]), "transformer", BF16)
    quantized = weights_bytes(read_architecture(wan[0], {"transformer": gguf_file}), "transformer", BF16)
    weights = list(wan[1].state_dict())
    model = load_model(wan[0], {"transformer": gguf_file}).modules["transformer"]
    saved_bytes = sum(
        rounded_bytes(2 * form.rows * form.columns) - rounded_bytes(form.stored_bytes)
        for form in quantized_weights(model).values()
    )
    assert saved_bytes > 0.3 * in_place
    assert quantized == in_place - saved_bytes
    assert len(weights) == len(model.state_dict())


def test_the_numbers_are_those_that_diffusers_reads(wan: tuple[Path, Any], gguf_file: Path) -> None:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    ours = load_model(wan[0], {"transformer": gguf_file}).modules["transformer"]
    theirs = read_by_diffusers(gguf_file, wan[0], BF16)
    forms = quantized_weights(ours)
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name)
        numbers = forms[mine].dequantized(mine.data, BF16) if mine in forms else mine.to(parameter.dtype)
        expected = dequantize_gguf_tensor(parameter)
        assert torch.equal(numbers, expected.to(numbers.dtype)), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_files_are_read_with_their_scales(wan: tuple[Path, Any], tmp_path: Path, scaled: bool, prefix: str) -> None:
    file = write_fp8(tmp_path / "wan_fp8.safetensors", wan[1].state_dict(), scaled=scaled, prefix=prefix)
    files = {"transformer": file}
    model = load_model(wan[0], files)
    assert model.architecture == read_architecture(wan[0], files)
    assert model.architecture.stored_formats == ("F8_E4M3",)
    transformer = model.modules["transformer"]
    forms = quantized_weights(transformer)
    for name, original in wan[1].state_dict().items():
        weight = transformer.get_parameter(name)
        numbers = forms[weight].dequantized(weight.data, torch.float32) if weight in forms else weight.float()
        assert ((numbers - original).norm() / original.norm()).item() < 0.04, name


def test_a_file_all_in_fp8_is_read(wan: tuple[Path, Any], tmp_path: Path) -> None:
    """Includes norms, biases and the patches' convolution, which become floats when they are loaded."""
    file = write_fp8(tmp_path / "wan_fp8.safetensors", wan[1].state_dict(), scaled=False, everything=True)
    transformer = load_model(wan[0], {"transformer": file}).modules["transformer"]
    for name in ("patch_embedding.weight", "blocks.0.scale_shift_table", "blocks.1.attn1.to_q.bias"):
        original, read = wan[1].get_parameter(name), transformer.get_parameter(name)
        assert torch.equal(read, original.to(torch.float8_e4m3fn).float())


def test_a_gguf_file_without_five_dimensions_is_read(wan: tuple[Path, Any], tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "flat.gguf", wan[1].state_dict(), flat=True)
    transformer = load_model(wan[0], {"transformer": file}).modules["transformer"]
    name = "patch_embedding.weight"
    assert torch.equal(transformer.get_parameter(name), wan[1].get_parameter(name))


def test_a_file_of_plain_floats_is_exact(wan: tuple[Path, Any], tmp_path: Path) -> None:
    weights = {published_name(name): tensor for name, tensor in wan[1].state_dict().items()}
    save_file(weights, tmp_path / "wan_fp32.safetensors")
    model = load_model(wan[0], {"transformer": tmp_path / "wan_fp32.safetensors"})
    assert model.architecture == read_architecture(wan[0])
    for name, tensor in wan[1].state_dict().items():
        assert torch.equal(model.modules["transformer"].get_parameter(name), tensor)


def test_a_file_with_diffusers_own_names_is_read(wan: tuple[Path, Any], tmp_path: Path) -> None:
    save_file(wan[1].state_dict(), tmp_path / "transformer.safetensors")
    model = load_model(wan[0], {"transformer": tmp_path / "transformer.safetensors"})
    norm = model.modules["transformer"].get_parameter("blocks.0.norm2.weight")
    assert torch.equal(norm, wan[1].blocks[0].norm2.weight)


def test_a_gguf_file_alone_in_the_transformers_folder_is_taken(
    wan: tuple[Path, Any], gguf_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wan"
    shutil.copytree(wan[0], folder)
    before = weights_identity(folder)
    shutil.copy(gguf_file, folder / "transformer")
    assert read_architecture(folder) == read_architecture(wan[0], {"transformer": gguf_file})
    assert load_model(folder).architecture.stored_formats == ("Q4_0", "Q8_0")
    assert weights_identity(folder) != before


def test_each_expert_may_have_a_file(save_wan: Callable[..., None], tmp_path: Path) -> None:
    experts = save_wan_of_blocks(save_wan, tmp_path / "a14b", layout="wan2.2-a14b")
    high = write_gguf(tmp_path / "high.gguf", experts["transformer"].state_dict())
    low = write_fp8(tmp_path / "low.safetensors", experts["transformer_2"].state_dict(), scaled=True)
    model = load_model(tmp_path / "a14b", {"transformer": high, "transformer_2": low})
    assert set(model.architecture.stored_formats) == {"Q4_0", "Q8_0", "F8_E4M3"}
    assert model.files == (high, low)
    assert weights_identity(model.folder, model.files) != weights_identity(model.folder)
    with pytest.raises(ModelFolderError, match=r"transformer_2/diffusion_pytorch_model\.safetensors is missing"):
        load_model(tmp_path / "a14b", {"transformer": high})
    experts["transformer_2"].save_pretrained(tmp_path / "a14b" / "transformer_2")
    one = load_model(tmp_path / "a14b", {"transformer": high})
    assert not quantized_weights(one.modules["transformer_2"])


def refused(wan: tuple[Path, Any], file: Path, match: str) -> None:
    """Assert that the plan and the loader both refuse a file, with a remedy."""
    for read in (read_architecture, load_model):
        with pytest.raises(ModelFolderError, match=match) as refusal:
            read(wan[0], {"transformer": file})
        assert file.name in refusal.value.problem
        assert refusal.value.remedy


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.99])
def test_a_file_cut_off_is_refused(wan: tuple[Path, Any], gguf_file: Path, tmp_path: Path, share: float) -> None:
    content = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(share * len(content))])
    refused(wan, tmp_path / "cut.gguf", "is damaged")


@pytest.mark.parametrize("name", ["x.gguf", "x.safetensors"])
def test_a_file_of_nonsense_is_refused(wan: tuple[Path, Any], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bytes(range(256)) * 8)
    refused(wan, tmp_path / name, "is damaged")


def test_other_kinds_of_file_and_none_are_refused(wan: tuple[Path, Any], tmp_path: Path) -> None:
    refused(wan, tmp_path / "absent.gguf", "there is no file")
    (tmp_path / "x.ckpt").write_bytes(b"x")
    refused(wan, tmp_path / "x.ckpt", "is not a weights file")


def test_another_architecture_is_refused(wan: tuple[Path, Any], tmp_path: Path) -> None:
    weights = {"double_blocks.0.img_attn.proj.weight": torch.ones(32, 32), "img_in.weight": torch.ones(32, 64)}
    refused(wan, write_gguf(tmp_path / "flux.gguf", weights, architecture="flux"), "holds no Wan transformer")


def test_text_to_video_is_refused_by_name(wan: tuple[Path, Any], tmp_path: Path) -> None:
    weights = tiny_transformer(sees=False, in_channels=16).state_dict()
    refused(wan, write_gguf(tmp_path / "t2v.gguf", weights), "takes 16 channels, not 36: it makes videos of text alone")


def test_a_wan_of_another_layout_is_refused(wan: tuple[Path, Any], tmp_path: Path) -> None:
    blind = tiny_transformer(sees=False).state_dict()
    refused(wan, write_gguf(tmp_path / "wan22.gguf", blind), "lacks .* of the transformer's weights")
    longer = tiny_transformer(num_layers=3).state_dict()
    refused(wan, write_gguf(tmp_path / "longer.gguf", longer), "weights of another model, such as blocks.2")
    wider = tiny_transformer(ffn_dim=256).state_dict()
    refused(wan, write_gguf(tmp_path / "wider.gguf", wider), r"ffn.* is \(256")


def test_a_weight_that_is_not_there_is_named(wan: tuple[Path, Any], tmp_path: Path) -> None:
    weights = with_one_removed(wan[1].state_dict(), "blocks.1.ffn.net.2.bias")
    refused(wan, write_gguf(tmp_path / "x.gguf", weights), "lacks 1 of .* such as blocks.1.ffn.net.2.bias")


def test_fp8_files_of_unknown_names_and_scales_are_refused(wan: tuple[Path, Any], tmp_path: Path) -> None:
    good = load_file(write_fp8(tmp_path / "good.safetensors", wan[1].state_dict(), scaled=True))
    save_file({f"net.{name}": tensor for name, tensor in good.items()}, tmp_path / "names.safetensors")
    refused(wan, tmp_path / "names.safetensors", "holds no Wan transformer")
    scale = "blocks.0.ffn.0.scale_weight"
    save_file({**good, scale: torch.ones(128)}, tmp_path / "rows.safetensors")
    refused(wan, tmp_path / "rows.safetensors", "128 scales")
    save_file({**good, "blocks.0.ffn.0.weight": torch.ones(128, 64)}, tmp_path / "float.safetensors")
    refused(wan, tmp_path / "float.safetensors", "not there in fp8")


@pytest.mark.parametrize("layer_format", ["mxfp8", "nvfp4", None])
def test_files_of_other_quantisations_are_refused(
    wan: tuple[Path, Any], tmp_path: Path, layer_format: str | None
) -> None:
    good = load_file(write_fp8(tmp_path / "good.safetensors", wan[1].state_dict(), scaled=False))
    name = "blocks.0.ffn.0"
    if layer_format is None:
        good[f"{name}.weight"] = torch.ones(128, 64, dtype=torch.int8)
    else:
        good[f"{name}.comfy_quant"] = torch.tensor(
            list(json.dumps({"format": layer_format}).encode()), dtype=torch.uint8
        )
    save_file(good, tmp_path / "other.safetensors")
    refused(wan, tmp_path / "other.safetensors", f"as {layer_format or 'I8'}, which cannot be used")


def test_the_newer_names_of_scales_are_read_too(wan: tuple[Path, Any], tmp_path: Path) -> None:
    content = load_file(write_fp8(tmp_path / "old.safetensors", wan[1].state_dict(), scaled=True))
    del content["scaled_fp8"]
    renamed = {name.replace(".scale_weight", ".weight_scale"): tensor for name, tensor in content.items()}
    layer_format = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    marks = {
        name.replace(".weight_scale", ".comfy_quant"): layer_format.clone() for name in renamed if "_scale" in name
    }
    save_file({**renamed, **marks, "blocks.0.ffn.0.input_scale": torch.ones(())}, tmp_path / "new.safetensors")
    old, new = (
        quantized_weights(load_model(wan[0], {"transformer": tmp_path / name}).modules["transformer"])
        for name in ("old.safetensors", "new.safetensors")
    )
    assert list(old.values()) == list(new.values())
    assert {form.scale for form in new.values()} != {1.0}


def test_a_gguf_format_that_diffusers_lacks_is_refused(wan: tuple[Path, Any], tmp_path: Path) -> None:
    weights = wan[1].state_dict()

    def types(name: str, tensor: torch.Tensor) -> QuantizationType:
        return QuantizationType.MXFP4 if name == "blocks.0.ffn.0.weight" else QuantizationType.F32

    refused(wan, write_gguf(tmp_path / "x.gguf", weights, types), "as MXFP4, which cannot be used")


@pytest.fixture
def no_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.quantizers.gguf.utils", None)


@pytest.mark.usefixtures("no_gguf")
def test_without_the_package_gguf_files_are_refused_and_others_are_not(
    wan: tuple[Path, Any], gguf_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        read_architecture(wan[0], {"transformer": gguf_file})
    file = write_fp8(tmp_path / "x.safetensors", wan[1].state_dict(), scaled=True)
    assert read_architecture(wan[0], {"transformer": file}).stored_formats == ("F8_E4M3",)


def test_files_for_components_that_a_model_lacks_are_refused(
    wan: tuple[Path, Any], gguf_file: Path, tiny_folder: Path
) -> None:
    with pytest.raises(BadInputError, match="I2VGen-XL takes no file for its transformer"):
        read_architecture(tiny_folder, {"transformer": gguf_file})
    with pytest.raises(BadInputError, match="has no transformer_2"):
        load_model(wan[0], {"transformer": gguf_file, "transformer_2": gguf_file})
