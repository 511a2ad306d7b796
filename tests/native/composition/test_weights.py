"""VRAM Fit with weights in every form that people load, each brought in as often as core does it without chunks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

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
            if not _is_traced(args):  # planning does the same without weights
                calls.append(1)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)
        return calls

    return count


def _is_traced(args: tuple[Any, ...]) -> bool:
    weight = getattr(args[0], "weight", args[0]) if args else None
    return getattr(getattr(weight, "_qdata", weight), "is_meta", False)


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


FORMATS = ("fp8", "fp8 e5m2", "nvfp4", "mxfp8", "int8", "int8 rotated", "int8 in full precision", "int4 rotated")
"""Names in `quantised.FORMATS`, which needs the host."""


@pytest.fixture(scope="module")
def tensors(core: Core, make_patcher: Any) -> dict[str, torch.Tensor]:
    """A file's tensors, of a Wan whose layers core's formats divide."""
    from .quantised import CONFIG

    return make_patcher("wan-t2v", config=CONFIG).model.diffusion_model.state_dict()


@pytest.fixture
def load_as(tensors: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """Loads the file in one of core's formats."""
    from .quantised import FORMATS, loaded, quantised_file

    def load(name: str) -> Any:
        if not FORMATS[name].exists:
            pytest.skip(f"this ComfyUI has no {name}")
        return as_wan(loaded(quantised_file(tensors, FORMATS[name])))

    return load


def as_wan(patcher: Any) -> Any:
    patcher.set_attachments(CASE, SMALL_MODELS["wan-t2v"])
    return patcher


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_weights_are_dequantised_as_often_as_in_core(
    load_as: Any, chunked: Fits, sample: Sample, counted: Any, name: str
) -> None:
    """Core multiplies int8 and int4 as they are."""
    from comfy.quant_ops import QuantizedTensor  # pyright: ignore[reportMissingImports]

    calls = counted(QuantizedTensor, "dequantize")
    patcher = load_as(name)
    expected = sample(patcher, cfg=1.0, latent_shape=LATENT_SHAPE)
    of_core = len(calls)
    result = sample(chunked(patcher), cfg=1.0, latent_shape=LATENT_SHAPE)
    assert off_by(result, expected) <= TOLERANCE
    assert len(calls) - of_core == of_core
    assert bool(of_core) == (not name.startswith("int"))


INPUT_SCALES = [None, 0.01]


@pytest.mark.parametrize("input_scale", INPUT_SCALES)
@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_are_multiplied_as_stored(
    load_as: Any, chunked: Fits, sample: Sample, name: str, input_scale: float | None
) -> None:
    """On a card for the format the input is quantised too, which magnifies the least difference of rounding."""
    from .quantised import multiply_as_stored

    patcher = load_as(name)
    multiply_as_stored(patcher, input_scale)
    expected = sample(patcher, latent_shape=LATENT_SHAPE)
    fitted = chunked(patcher)
    assert off_by(sample(fitted, latent_shape=LATENT_SHAPE), expected) <= TOLERANCE
    is_whole = name == "nvfp4" and input_scale is None
    assert ("20 linear layers run unchunked" in str(chunked.fit_of(fitted))) == is_whole


def test_formats_that_are_known_to_scale_by_row_do(core: Core) -> None:
    """A row's quantised numbers are the same, whatever lies in the other rows."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(256, 256, generator=generator)
    rows[128:] *= 1000
    by_row = core.native("quantised_layers")._SCALED_BY_ROW
    for name, algorithm in QUANT_ALGOS.items():
        if not algorithm.get("quantize_input", True):
            continue  # quantised within the product, row by row

        def restored(part: torch.Tensor, layout: str = algorithm["comfy_tensor_layout"]) -> torch.Tensor:
            return QuantizedTensor.from_float(part, layout, scale=None).dequantize()

        assert torch.equal(restored(rows)[:128], restored(rows[:128])) == (name in by_row), name


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "int8"])
def test_a_lora_on_offloaded_quantised_weights(
    load_as: Any, as_lowvram: None, assert_as_often: Any, counted: Any, name: str
) -> None:
    """Core adds it to the dequantised weight, and leaves the input as it is then."""
    import comfy.lora  # pyright: ignore[reportMissingImports]

    from .quantised import multiply_as_stored

    patcher = load_as(name)
    multiply_as_stored(patcher)
    for layer in ("ffn.0", "self_attn.k", "cross_attn.o"):
        key = f"diffusion_model.blocks.1.{layer}.weight"
        shape = patcher.model.get_submodule(f"diffusion_model.blocks.1.{layer}").weight.shape
        patcher.add_patches({key: (torch.full(shape, 0.01),)}, 1.0)
    assert_as_often(patcher, counted(comfy.lora, "calculate_weight"))


def test_scaled_fp8_files_of_before(tensors: dict[str, torch.Tensor], chunked: Fits, sample: Sample) -> None:
    """With `scaled_fp8` and `scale_weight`, which core converts."""
    from .quantised import is_block_weight, loaded

    file = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if is_block_weight(name, tensor):
            scale = tensor.abs().max() / 448
            file[name] = (tensor / scale).to(torch.float8_e4m3fn)
            file[name.removesuffix("weight") + "scale_weight"] = scale
        else:
            file[name] = tensor
    patcher = as_wan(loaded(file))
    expected = sample(patcher, latent_shape=LATENT_SHAPE)
    assert off_by(sample(chunked(patcher), latent_shape=LATENT_SHAPE), expected) <= TOLERANCE
    assert chunked.chunks


def test_fast_fp8_stays_fp8(
    core: Core, tensors: dict[str, torch.Tensor], chunked: Fits, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core's `fp8_e4m3fn_fast` multiplies only weights that are stored so."""
    from .quantised import loaded

    patcher = as_wan(loaded(tensors, dtype=torch.float8_e4m3fn, custom_operations=core.ops.fp8_ops))
    patcher.model.manual_cast_dtype = torch.float32
    multiplied: list[torch.dtype] = []
    fp8_linear = core.ops.fp8_linear

    def seen(layer: Any, x: torch.Tensor) -> Any:
        multiplied.append(layer.weight.dtype)
        return fp8_linear(layer, x)

    monkeypatch.setattr(core.ops, "fp8_linear", seen)
    expected = sample(patcher, latent_shape=LATENT_SHAPE)
    assert off_by(sample(chunked(patcher), latent_shape=LATENT_SHAPE), expected) <= TOLERANCE
    assert chunked.chunks
    assert set(multiplied) == {torch.float8_e4m3fn}


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("packing", ["Q8_0", "Q4_0"])
def test_gguf_weights_are_dequantised_as_often_as_in_core(
    tensors: dict[str, torch.Tensor], assert_as_often: Any, counted: Any, packing: str, has_lora: bool
) -> None:
    """Through layers such as ComfyUI-GGUF's."""
    import comfy.lora  # pyright: ignore[reportMissingImports]
    import gguf

    from .gguf_ops import PackedModelPatcher, PackedOps, PackedTensor
    from .quantised import is_block_weight, loaded

    kind = gguf.GGMLQuantizationType[packing]
    file = {
        name: PackedTensor.of(tensor, kind) if is_block_weight(name, tensor) else tensor
        for name, tensor in tensors.items()
    }
    patcher = as_wan(loaded(file, custom_operations=PackedOps))
    patcher.__class__ = PackedModelPatcher
    if has_lora:
        key = "diffusion_model.blocks.0.ffn.0.weight"
        patcher.add_patches({key: (torch.full(tensors["blocks.0.ffn.0.weight"].shape, 0.01),)}, 1.0)
    assert_as_often(
        patcher, counted(comfy.lora, "calculate_weight") if has_lora else counted(gguf.quants, "dequantize")
    )


class Elsewhere(torch.nn.Parameter):
    """A parameter that core takes for one on another device."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("meta")


def test_weights_stay_while_other_layers_come_in(
    make_patcher: Any, as_lowvram: None, chunked: Fits, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core brings weights in through a buffer of each of two streams, so a third layer overwrites the first."""
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    class Stream:
        as_context = staticmethod(nullcontext)

        def wait_stream(self, _: Any) -> None:
            pass

    streams = [Stream(), Stream()]

    used: list[Stream] = []

    def next_stream(_: Any) -> Stream:
        streams.reverse()
        used.append(streams[0])
        return streams[0]

    patcher = make_patcher("wan-t2v")
    expected = sample(patcher, latent_shape=LATENT_SHAPE)
    monkeypatch.setattr(management, "get_offload_stream", next_stream)
    monkeypatch.setattr(management, "STREAM_CAST_BUFFERS", {})
    for layer in patcher.model.diffusion_model.blocks.modules():
        if layer._parameters.get("weight") is not None:
            layer._parameters["weight"] = Elsewhere(layer.weight.data, requires_grad=False)
    assert off_by(sample(chunked(patcher), latent_shape=LATENT_SHAPE), expected) <= TOLERANCE
    assert chunked.chunks
    assert used


def test_held_weights_are_not_looked_for_in_dynamic_memory(core: Core) -> None:
    """Where core keeps those that it streams to a card."""
    layer = core.ops.manual_cast.Linear(4, 4, dtype=torch.float16)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    layer._v = "a place in dynamic memory"
    names = list(layer.state_dict())
    with core.native("held_weights").held([layer], torch.device("cpu"), torch.float32):
        assert not hasattr(layer, "_v")
        assert layer.weight.dtype == torch.float32
    assert layer._v == "a place in dynamic memory"
    assert layer.weight.dtype == torch.float16
    assert list(layer.state_dict()) == names


def test_weights_are_counted_as_they_are_stored(
    load_as: Any, tensors: dict[str, torch.Tensor], fits: Fits, sample: Sample
) -> None:
    """And what a layer holds, as it computes with them."""
    from .quantised import FORMATS, quantised_file

    fitted = fits(load_as("fp8"))
    sample(fitted, cfg=1.0, latent_shape=LATENT_SHAPE)
    fit = fits.fit_of(fitted)
    stored_bytes = sum(it.nbytes for it in quantised_file(tensors, FORMATS["fp8"]).values())
    assert fit.plan.weights_bytes == pytest.approx(stored_bytes, rel=0.01)


ROWS = {"query": slice(0, 32), "key": slice(32, 64), "value": slice(64, 96)}


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("stored", ["fp32", "fp16", "fp8", "int8", "fp8 with a scale", "fp16 with a LoRA", "Q8_0"])
def test_rows_of_a_linear_layer(core: Core, monkeypatch: pytest.MonkeyPatch, stored: str, is_held: bool) -> None:
    """Some outputs of a layer that makes several tensors at once; without the others where its weight is held plain."""
    rows = core.native("fused_linear")
    linear = torch.nn.functional.linear
    layer = fused_layer(core, stored)
    inputs = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(5))
    expected = layer(inputs)
    sizes: list[int] = []
    cpu = torch.device("cpu")
    with core.native("held_weights").held([layer] if is_held else [], cpu, torch.float32):
        for part in ROWS.values():
            with monkeypatch.context() as counted:
                counted.setattr(
                    torch.nn.functional, "linear", lambda *given: sizes.append(len(given[1])) or linear(*given)
                )
                made = rows.linear_rows(layer, inputs, part)
            assert off_by(made, expected[..., part]) <= TOLERANCE
    assert torch.equal(layer(inputs), expected)
    is_cut = is_held or stored in ("fp32", "fp8", "int8", "fp8 with a scale")
    assert set(sizes) <= ({32} if is_cut else {96})


def fused_layer(core: Core, stored: str) -> Any:
    """A linear layer of 96 outputs as one of core's loaders leaves it."""
    import gguf

    from .gguf_ops import PackedOps, PackedTensor
    from .quantised import FORMATS, quantised_file

    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    if stored == "Q8_0":
        layer = PackedOps.Linear(64, 96)
        file = {"weight": PackedTensor.of(weight, gguf.GGMLQuantizationType.Q8_0), "bias": bias}
    elif stored.startswith(("fp8", "int8")):
        name = stored.split(maxsplit=1)[0]
        if not FORMATS[name].exists:
            pytest.skip(f"this ComfyUI has no {name}")
        operations = core.ops.mixed_precision_ops({}, torch.float32, disabled=["float8_e4m3fn"])
        layer = operations.Linear(64, 96)
        quantised = quantised_file({"blocks.weight": weight}, FORMATS[name])
        file = {name.removeprefix("blocks."): it for name, it in quantised.items()} | {"bias": bias}
    else:
        dtype = torch.float32 if stored == "fp32" else torch.float16
        layer = core.ops.manual_cast.Linear(64, 96, dtype=dtype)
        file = {"weight": weight.to(dtype), "bias": bias.to(dtype)}
    layer.load_state_dict(file, strict=False)
    layer.requires_grad_(False)
    if stored == "fp8 with a scale":
        layer.pre_quant_scale = torch.nn.Parameter(torch.linspace(0.5, 2, 64), requires_grad=False)
    if stored == "fp16 with a LoRA":
        layer.weight_function = [lambda it: it * 1.5]
    return layer
