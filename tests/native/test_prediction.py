"""Traces on meta tensors against attention kernels, fused operations and copies of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import CASE, Core, predicted_and_measured

pytestmark = pytest.mark.host
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEADS, QUERIES, KEYS, WIDTH = 4, 256, 380, 64


def inputs(device: str, dtype: torch.dtype, *, by_heads: bool, width: int = WIDTH) -> list[torch.Tensor]:
    """Query, key and value as models hand them to core's attention."""
    shapes = [(1, HEADS, it, width) if by_heads else (1, it, HEADS * width) for it in (QUERIES, KEYS, KEYS)]
    return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]


def traced(core: Core, device: torch.device, run: Callable[[], Any]) -> int:
    with torch.no_grad(), core.native("kernel_memory").kernels_traced(device) as meter:
        result = run()
        del result
    return meter.peak_bytes


def metered(core: Core, run: Callable[[], Any]) -> int:
    with torch.no_grad(), core.native("kernel_memory").kernel_meter(CPU) as meter:
        result = run()
        del result
    return meter.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_heads", [False, True])
@pytest.mark.parametrize("name", ["attention_pytorch", "attention_basic", "attention_sub_quad", "attention_split"])
def test_attention_takes_what_it_is_predicted_to(
    core: Core, monkeypatch: pytest.MonkeyPatch, name: str, by_heads: bool, dtype: torch.dtype
) -> None:
    """Core's own functions, those that adapt to what is free where little is."""
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]
    from comfy.ldm.modules import attention  # pyright: ignore[reportMissingImports]

    in_64_steps = 3 * HEADS * QUERIES * KEYS * dtype.itemsize / 64 + 1
    free_bytes = in_64_steps if name == "attention_split" else 1

    def little(_device: Any = None, torch_free_too: bool = False) -> Any:
        return (free_bytes, free_bytes) if torch_free_too else free_bytes

    monkeypatch.setattr(management, "get_free_memory", little)
    function = getattr(attention, name).__wrapped__
    predict = core.native("attention_memory").attention_output

    def run(device: str, attend: Callable[..., Any]) -> Callable[[], Any]:
        given = inputs(device, dtype, by_heads=by_heads)
        return lambda: attend(*given, HEADS, skip_reshape=by_heads)

    measured = metered(core, run("cpu", function))
    predicted = traced(core, CPU, run("meta", lambda *args, **kwargs: predict(function, *args, **kwargs)))
    assert predicted == pytest.approx(measured, rel=0.002)


@pytest.mark.parametrize(
    ("name", "by_heads", "expected"),
    [
        # Query and key in 8 bits, the value transposed and in 8 bits, padded where the card is not known.
        ("attention_sage", False, QUERIES * (1 + 2) + KEYS * (1 + 5)),
        ("attention_sage", True, QUERIES * (1 + 2) + KEYS * (1 + 5)),
        ("attention_xformers", False, QUERIES * (2 + 4 / WIDTH)),
    ],
)
def test_kernels_take_what_their_source_says(core: Core, name: str, by_heads: bool, expected: float) -> None:
    def function() -> None:
        raise AssertionError

    function.__name__ = name
    predict = core.native("attention_memory").attention_output
    given = inputs("meta", torch.bfloat16, by_heads=by_heads)
    peak_bytes = traced(core, CUDA, lambda: predict(function, *given, HEADS, skip_reshape=by_heads))
    assert peak_bytes == pytest.approx(HEADS * WIDTH * expected, rel=0.01)


def test_attention_of_another_node_is_taken_for_the_one_that_takes_most(core: Core) -> None:
    from comfy.ldm.modules import attention  # pyright: ignore[reportMissingImports]

    memory = core.native("attention_memory")
    given = inputs("meta", torch.bfloat16, by_heads=False)
    own, replaced = (
        traced(core, CUDA, lambda predict=predict: predict(attention.attention_pytorch.__wrapped__, *given, HEADS))
        for predict in (memory.attention_output, memory.replaced_attention_output)
    )
    assert replaced > 3 * own


def test_a_normalisation_is_one_kernel_on_cuda(core: Core) -> None:
    rows = torch.empty(1000, 64, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64, dtype=torch.bfloat16, device="meta")

    def normalise() -> torch.Tensor:
        return torch.nn.functional.rms_norm(rows, (64,), weight, 1e-6)

    assert traced(core, CPU, normalise) >= 3 * 2 * rows.nbytes
    if hasattr(torch.ops.aten, "_fused_rms_norm"):
        assert traced(core, CUDA, normalise) == pytest.approx(rows.nbytes, rel=0.05)


def test_a_convolution_takes_a_workspace_on_cuda(core: Core) -> None:
    convolution = torch.nn.Conv3d(8, 16, 3, padding=1, device="meta", dtype=torch.bfloat16)
    frames = torch.empty(1, 8, 4, 16, 16, dtype=torch.bfloat16, device="meta")
    plain, with_workspace = (traced(core, device, lambda: convolution(frames)) for device in (CPU, CUDA))
    assert with_workspace >= 2 * plain + frames.nbytes


def test_rotary_embeddings_without_a_kernel_count_as_what_they_run_as(core: Core) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    made = [
        (torch.zeros(1, 300, 4, 32, dtype=torch.bfloat16, device=it), torch.zeros(1, 300, 1, 16, 2, 2, device=it))
        for it in ("cpu", "meta")
    ]
    (real, _), _ = made
    measured = metered(core, lambda: kitchen.apply_rope1(*made[0]))
    assert traced(core, CPU, lambda: kitchen.apply_rope1(*made[1])) == measured >= 4 * real.nbytes


def quantised(core: Core, model: Any, layout: str, algorithm: str) -> None:
    """Puts core's quantised linear layers into a model's blocks."""
    from comfy.quant_ops import QuantizedTensor  # pyright: ignore[reportMissingImports]

    kind = core.ops.mixed_precision_ops({}, torch.bfloat16).Linear
    for block in model.blocks:
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer).__name__ != "Linear":
                    continue
                other = kind(layer.in_features, layer.out_features, bias=True, dtype=torch.bfloat16)
                other.bias = layer.bias
                other.weight = torch.nn.Parameter(QuantizedTensor.from_float(layer.weight.data, layout), False)
                other.quant_format, other.layout_type = algorithm, layout
                setattr(parent, name, other)


@pytest.mark.parametrize("workspace_bytes", [None, 1])
@pytest.mark.parametrize("stored", ["float8", "int8_tensorwise", "float8_e4m3fn"])
def test_copies_of_stored_weights_are_counted(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    stored: str,
    workspace_bytes: int | None,
) -> None:
    """Weights that core casts for a layer, and quantised ones with what they make of the layer's input."""
    layouts = {"int8_tensorwise": "TensorWiseINT8Layout", "float8_e4m3fn": "TensorCoreFP8E4M3Layout"}
    dtype = torch.float8_e4m3fn if stored == "float8" else torch.bfloat16
    patcher = make_patcher("wan-t2v", dtype=dtype, compute_dtype=torch.bfloat16 if stored == "float8" else None)
    if stored in layouts:
        if not hasattr(core.ops, "mixed_precision_ops"):
            pytest.skip("this ComfyUI has no quantised layers")
        quantised(core, patcher.model.diffusion_model, layouts[stored], stored)
    ((predicted, measured),) = predicted_and_measured(core, patcher, sample, workspace_bytes)
    assert measured <= predicted <= 1.05 * measured


@pytest.fixture
def call(core: Core, make_patcher: Callable[..., Any]) -> Any:
    """A small model's patcher and its call to come."""
    import comfy.sampler_helpers as helpers  # pyright: ignore[reportMissingImports]

    patcher = make_patcher("wan-t2v")
    case = patcher.get_attachment(CASE)
    conds = {"positive": helpers.convert_cond([case.conditioning(torch.Generator(), case.latent_shape)])}
    return patcher, core.recorded_calls(patcher, conds)[0].call


def test_lora_is_counted_where_weights_do_not_stay(core: Core, call: Any) -> None:
    """Weights that stay are patched when they are loaded."""
    patcher, shapes = call
    model = patcher.model.diffusion_model
    names = {f"blocks.{index}.ffn.0.weight" for index in range(3)}
    planner = core.native("call_planner").CallPlanner(core.native("model").native_model(model), patcher.model, CPU)
    little = planner.lowest_needed_bytes(shapes) + planner.weights_bytes // 4
    asked: list[Any] = []
    make = core.native("call_planner").Twin

    def heard(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["patched"])
        return make(*args, **kwargs)

    planner.look_at(replaced_attention=False, patched=names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core.native("call_planner"), "Twin", heard)
        assert planner.plan(shapes, 2**40).holds_all_weights
        assert asked == []
        assert not planner.plan(shapes, little).holds_all_weights
        assert asked == [names]


def test_a_patched_weight_is_copied_and_two_products_made_beside_it(core: Core, call: Any) -> None:
    model = call[0].model.diffusion_model
    native = core.native("model").native_model(model)

    def peak_bytes(patched: set[str]) -> int:
        twin = core.native("twin").Twin(native, model, torch.float32, patched=patched)
        layer = twin.model.blocks[1].ffn[0]
        return traced(core, CPU, lambda: layer(torch.empty(1, 10, layer.in_features, device="meta")))

    weight_bytes = model.blocks[1].ffn[0].weight.nbytes
    assert peak_bytes({"blocks.1.ffn.0.weight"}) == pytest.approx(peak_bytes(set()) + 3 * weight_bytes, rel=0.1)
