"""Quantised weights: dequantised as by diffusers, within the predicted memory, and restored bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import quantize
from torch import Tensor, nn

from i2v_core.batch.execution.model_cache import replicate
from i2v_core.errors import MissingPackageError
from i2v_core.families import I2VModel
from i2v_core.memory.meter import StorageMeter
from i2v_core.placement.quantized import (
    FP8_FORMATS,
    Quantized,
    block_of,
    gguf_formats,
    quantized_weights,
    set_storage_format,
)
from i2v_core.placement.storage import StoredWeights, WeightStorage, reducible, resident
from i2v_core.placement.streaming import streamed

CPU = torch.device("cpu")
FORMATS = sorted(kind.name for kind in gguf_formats().dequantize_functions if kind.name != "BF16")
# More rows than one chunk has.
ROWS, COLUMNS = 5000, 512


def some_bytes(form: Quantized) -> Tensor:
    """Return random bytes of at most 59, so that those that are read as fp16 scales are finite and below 1."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 60, (form.rows, form.row_bytes), dtype=torch.uint8, generator=generator)


def by_diffusers(form: Quantized, stored: Tensor) -> Tensor:
    formats = gguf_formats()
    parameter = formats.GGUFParameter(stored, quant_type=gguf.GGMLQuantizationType[form.format])
    return formats.dequantize_gguf_tensor(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_gguf_numbers_are_those_that_diffusers_makes(name: str, dtype: torch.dtype) -> None:
    form = Quantized(format=name, rows=ROWS, columns=COLUMNS)
    stored = some_bytes(form)
    predicted_bytes = form.dequantizing_bytes
    with StorageMeter() as meter:
        restored = form.dequantized(stored, dtype)
    assert torch.equal(restored, by_diffusers(form, stored).to(dtype))
    assert restored.abs().sum() > 0
    measured_bytes = meter.peak_bytes - restored.nbytes
    # GGUF formats also allocate tables of a few numbers.
    assert 0.95 * predicted_bytes <= measured_bytes <= predicted_bytes + 4096


def test_what_was_written_comes_back_as_close_as_the_format_allows() -> None:
    numbers = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for name, most in (("Q8_0", 0.006), ("Q5_0", 0.05), ("Q4_0", 0.1)):
        form = Quantized(format=name, rows=64, columns=256)
        stored = torch.from_numpy(quantize(numbers.numpy(), gguf.GGMLQuantizationType[name]))
        assert stored.shape == (form.rows, form.row_bytes)
        error = (form.dequantized(stored, torch.float32) - numbers).norm() / numbers.norm()
        assert most / 10 <= error <= most


@pytest.mark.parametrize("name", FP8_FORMATS)
def test_fp8_numbers_are_scaled_and_take_nothing_beside_them(name: str) -> None:
    numbers = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    stored = numbers.to(FP8_FORMATS[name])
    form = Quantized(format=name, rows=64, columns=48, scale=0.25)
    assert form.stored_bytes == stored.nbytes
    with StorageMeter() as meter:
        restored = form.dequantized(stored.view(torch.uint8), torch.float32)
    assert torch.equal(restored, stored.float() * 0.25)
    assert meter.peak_bytes - restored.nbytes == form.dequantizing_bytes == 0


def quantized_pair() -> tuple[nn.Linear, nn.Linear]:
    """Return a linear layer with a quantised weight, and one with the same numbers as floats."""
    plain = nn.Linear(64, 32).requires_grad_(False)
    layer = nn.Linear(64, 32).requires_grad_(False)
    form = Quantized(format="Q8_0", rows=32, columns=64)
    stored = torch.from_numpy(quantize(plain.weight.numpy(), gguf.GGMLQuantizationType.Q8_0))
    layer.bias.data = plain.bias.data
    layer.weight = nn.Parameter(stored, requires_grad=False)
    set_storage_format(layer, form)
    plain.weight.data = form.dequantized(stored, torch.float32)
    return layer, plain


@pytest.mark.parametrize("put", [resident, streamed])
def test_a_call_computes_with_dequantized_numbers_and_leaves_the_bytes(put: Callable[..., Any]) -> None:
    layer, plain = quantized_pair()
    before = layer.weight.data.clone()
    inputs = torch.randn(3, 64)
    with put(layer, CPU, torch.float32, WeightStorage.AS_COMPUTED) as runner:
        with runner.enter(SimpleNamespace(modules=(layer,))):
            assert torch.equal(layer(inputs), plain(inputs))
        assert not layer.weight.is_floating_point()
    assert torch.equal(layer.weight.data, before)


def test_quantized_weights_are_not_reduced_further() -> None:
    layer, plain = quantized_pair()
    both = nn.Sequential(layer, plain)
    assert reducible(both) == [plain.weight]
    weights = StoredWeights(both, CPU, torch.float32, WeightStorage.FP8)
    assert weights.reduced(layer.weight) is None
    assert torch.equal(weights.dequantized(layer.weight, layer.weight.data), plain.weight)


def test_a_replica_is_stored_as_its_model_is() -> None:
    layer, _ = quantized_pair()
    model: Any = I2VModel(architecture=None, folder=None, modules={"transformer": layer}, tokenizer=None)  # pyright: ignore[reportArgumentType]
    other = replicate(model).modules["transformer"]
    (weight,) = quantized_weights(other)
    assert weight is other.weight is not layer.weight
    assert weight.data_ptr() == layer.weight.data_ptr()


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.quantizers.gguf.utils", None)
    with pytest.raises(MissingPackageError, match="pip install gguf"):
        block_of("Q4_K")
    assert block_of("F8_E4M3") == (1, 1)
