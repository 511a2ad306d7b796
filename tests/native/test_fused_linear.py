"""Some outputs of a linear layer: as the layer makes them, and without the others where its weight allows it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .conftest import Core

pytestmark = pytest.mark.host
TOKENS, WIDTH, OUTPUTS = 5, 64, 384
ROWS = slice(128, 256)
CPU = torch.device("cpu")


class Widest(TorchDispatchMode):
    """The widest rows that an operation makes for all tokens."""

    width = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[:-1] == (TOKENS,):
            self.width = max(self.width, result.shape[-1])
        return result


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def plain(core: Core, stored: torch.dtype = torch.float32) -> Any:
    operations = core.ops.disable_weight_init if stored is torch.float32 else core.ops.manual_cast
    layer = operations.Linear(WIDTH, OUTPUTS, dtype=stored)
    layer.load_state_dict({"weight": random(OUTPUTS, WIDTH), "bias": random(OUTPUTS)})
    return layer


def quantised(core: Core, quant_format: str, **options: Any) -> Any:
    """A layer that core has loaded from a file."""
    from comfy import quant_ops  # pyright: ignore[reportMissingImports]

    if quant_format not in quant_ops.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {quant_format}")
    layout = quant_ops.QUANT_ALGOS[quant_format]["comfy_tensor_layout"]
    scale = {"scale": "recalculate"} if quant_format.startswith("float8") else {}
    weight = quant_ops.QuantizedTensor.from_float(random(OUTPUTS, WIDTH), layout, **scale, **options)
    described = {"format": quant_format, **{name: it for name, it in options.items() if name.startswith("convrot")}}
    layer = core.ops.mixed_precision_ops({}, torch.float32).Linear(WIDTH, OUTPUTS, dtype=torch.float32)
    encoded = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    layer.load_state_dict({**weight.state_dict("weight"), "comfy_quant": encoded, "bias": random(OUTPUTS)})
    layer.bias.requires_grad_(False)
    return layer


def rows_and_width(core: Core, layer: Any) -> tuple[torch.Tensor, int]:
    """Some outputs of a layer while it is held, and the most outputs that were computed for them."""
    runner = core.native("held_weights").HeldWeightsRunner(CPU, torch.float32)
    call = type("Call", (), {"modules": (layer,)})()
    with torch.no_grad(), runner.enter(call), Widest() as widest:
        result = core.native("fused_linear").linear_rows(layer, random(TOKENS, WIDTH), ROWS)
    return result, widest.width


def all_outputs(layer: Any) -> torch.Tensor:
    with torch.no_grad():
        return layer(random(TOKENS, WIDTH))


QUANTISED = [
    ("int8_tensorwise", {}),
    ("int8_tensorwise", {"per_channel": True, "convrot": True, "convrot_groupsize": 64}),
    ("float8_e4m3fn", {}),
    ("nvfp4", {}),
    ("mxfp8", {}),
]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_plain_and_cast_weights(core: Core, stored: torch.dtype) -> None:
    layer = plain(core, stored)
    expected = all_outputs(layer)[:, ROWS]
    result, width = rows_and_width(core, layer)
    torch.testing.assert_close(result, expected)
    assert width == 128
    assert layer.weight.shape == (OUTPUTS, WIDTH)
    assert layer.bias.shape == (OUTPUTS,)


@pytest.mark.parametrize(("quant_format", "options"), QUANTISED)
def test_weights_that_are_multiplied_as_they_are_stored(core: Core, quant_format: str, options: dict[str, Any]) -> None:
    layer = quantised(core, quant_format, **options)
    expected = all_outputs(layer)[:, ROWS]
    result, width = rows_and_width(core, layer)
    torch.testing.assert_close(result, expected)
    assert width == 128
    assert layer.weight.shape == (OUTPUTS, WIDTH)


def test_rows_whose_scales_are_stored_with_others(core: Core) -> None:
    """Formats of block scales are not sliced between the blocks."""
    layer = quantised(core, "mxfp8")
    linear_rows = core.native("fused_linear").linear_rows
    with torch.no_grad():
        result = linear_rows(layer, random(TOKENS, WIDTH), slice(32, 64))
    torch.testing.assert_close(result, all_outputs(layer)[:, 32:64])


@pytest.mark.parametrize("make", [plain, lambda core: quantised(core, "float8_e4m3fn")])
def test_a_lora_is_applied(core: Core, make: Any) -> None:
    """Core leaves it to the layer where the weights are not all on the device."""
    layer = make(core)
    without = all_outputs(layer)
    layer.weight_function = [lambda weight: weight + 0.5]
    expected = all_outputs(layer)[:, ROWS]
    assert not torch.allclose(expected, without[:, ROWS])
    result, width = rows_and_width(core, layer)
    torch.testing.assert_close(result, expected)
    assert width == 128
    assert layer.weight_function


def test_a_forward_that_another_node_has_replaced(core: Core) -> None:
    layer = plain(core)
    own = layer.forward
    layer.forward = lambda inputs: own(inputs) * torch.linspace(0, 1, OUTPUTS)
    result, width = rows_and_width(core, layer)
    torch.testing.assert_close(result, all_outputs(layer)[:, ROWS])
    assert width == OUTPUTS


def test_a_format_without_rows_makes_all(core: Core) -> None:
    layer = quantised(core, "int8_tensorwise")
    fused_linear = core.native("fused_linear")
    assert fused_linear.has_sliceable_format(layer)
    layer.quant_format = "a_format_to_come"
    assert not fused_linear.has_sliceable_format(layer)
    with torch.no_grad():
        result = fused_linear.linear_rows(layer, random(TOKENS, WIDTH), ROWS)
    torch.testing.assert_close(result, all_outputs(layer)[:, ROWS])
