"""VRAM Fit with weights in every form that people load, each brought in as often as core does it without chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ..conftest import CASE, SMALL_MODELS, TOLERANCE, Core, off_by
from .conftest import LATENT_SHAPE, Fits, Sample

pytestmark = pytest.mark.host


@pytest.fixture
def as_lowvram(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets core load models as where no weight fits the card: cast, and LoRAs added, whenever a layer runs."""
    patcher = core.model_patcher.ModelPatcher
    load = patcher.load

    def load_nothing(self: Any, device_to: Any = None, **kwargs: Any) -> Any:
        return load(self, device_to, **{**kwargs, "lowvram_model_memory": 1, "full_load": False})

    monkeypatch.setattr(patcher, "load", load_nothing)


@pytest.fixture
def lora_file(wan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a LoRA for core's loaders, of every linear layer of one block."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in wan.model.diffusion_model.blocks[1].named_parameters():
        if name.endswith(".weight") and parameter.ndim == 2:
            key = f"diffusion_model.blocks.1.{name.removesuffix('.weight')}"
            rows, columns = parameter.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, tmp_path / "small.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return "small.safetensors"


@pytest.mark.parametrize("loader", ["LoraLoaderModelOnly", "LoraLoaderBypassModelOnly"])
def test_loras(assert_composes: Any, wan: Any, sample: Sample, run_node: Any, lora_file: str, loader: str) -> None:
    """Added to the weights when they are loaded, or to the layers' results."""
    module = "nodes" if loader == "LoraLoaderModelOnly" else "comfy_extras.nodes_lora_debug"

    def apply(model: Any) -> Any:
        return run_node(module, loader, model=model, lora_name=lora_file, strength_model=0.8)

    expected = assert_composes(apply)
    assert off_by(sample(wan, latent_shape=LATENT_SHAPE), expected) > 1e-3


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[int]]:
    """Counts calls of a function; returns the list that grows with each."""

    def count(owner: Any, name: str) -> list[int]:
        calls: list[int] = []
        function = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)
        return calls

    return count


@pytest.fixture
def assert_as_often(chunked: Fits, sample: Sample) -> Callable[..., None]:
    """Holds a fitted model against the model as it is: the result, and how often something was done for it."""

    def check(patcher: Any, calls: list[int], tolerance: float = TOLERANCE) -> None:
        expected = sample(patcher, cfg=1.0, latent_shape=LATENT_SHAPE)
        of_core = len(calls)
        result = sample(chunked(patcher), cfg=1.0, latent_shape=LATENT_SHAPE)
        assert chunked.chunks
        assert off_by(result, expected) <= tolerance
        assert len(calls) - of_core == of_core > 0

    return check


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_a_lora_is_added_to_offloaded_weights_as_often_as_in_core(
    make_patcher: Any, as_lowvram: None, assert_as_often: Any, counted: Any, stored: torch.dtype
) -> None:
    import comfy.lora  # pyright: ignore[reportMissingImports]

    patcher = make_patcher("wan-t2v", dtype=stored, compute_dtype=torch.float32)
    names = ("patch_embedding", "blocks.0.ffn.0", "blocks.0.self_attn.k", "blocks.1.cross_attn.v", "head.head")
    for name in names:
        layer = patcher.model.get_submodule(f"diffusion_model.{name}")
        for part in ("weight", "bias"):
            change = torch.full(getattr(layer, part).shape, 0.01)
            patcher.add_patches({f"diffusion_model.{name}.{part}": (change,)}, 1.0)
    assert_as_often(patcher, counted(comfy.lora, "calculate_weight"))


@pytest.fixture
def quantised(core: Core, wan: Any) -> Any:
    """The helpers of `quantised.py`, which need the host."""
    from . import quantised

    return quantised


@pytest.fixture(scope="module")
def tensors(core: Core, make_patcher: Any) -> dict[str, torch.Tensor]:
    """A file's tensors of a Wan whose layers core's formats divide."""
    from .quantised import CONFIG

    return make_patcher("wan-t2v", config=CONFIG).model.diffusion_model.state_dict()


def load_as(quantised: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    chosen = quantised.FORMATS[name]
    if not chosen.exists:
        pytest.skip(f"this ComfyUI has no format {chosen.name}")
    patcher = quantised.loaded(quantised.quantised_file(tensors, chosen))
    patcher.set_attachments(CASE, SMALL_MODELS["wan-t2v"])
    return patcher


FORMATS = ("fp8", "fp8 e5m2", "nvfp4", "mxfp8", "int8", "int8 rotated", "int4 rotated")
"""Names in `quantised.FORMATS`."""
