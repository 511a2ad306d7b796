"""Weights stored in 8 bits: accuracy, memory, and that the module is restored."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from i2v_core.chunking import ChunkSettings, LayerRunner
from i2v_core.errors import MissingPackageError
from i2v_core.families import I2VModel, VideoSize, family_of, load_model
from i2v_core.memory.meter import StorageMeter
from i2v_core.placement.storage import StoredWeights, WeightStorage, reducible, resident
from i2v_core.placement.streaming import streamed

CPU = torch.device("cpu")
SETTINGS = ChunkSettings(workspace_bytes=64 * 1024)
SIZE = VideoSize(width_pixels=64, height_pixels=64, frames=3)

Put = Callable[..., AbstractContextManager[LayerRunner]]

every_way = pytest.mark.parametrize("put", [resident, streamed])
eight_bits = pytest.mark.parametrize("storage", [WeightStorage.INT8, WeightStorage.FP8])


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    """Return a model in which every parameter matters; diffusers initialises some to zero, which would hide errors."""
    model = load_model(tiny_folder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.modules["unet"].parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(0.5).add_(noise, alpha=0.5 / max(1, parameter[0].numel()) ** 0.5)
    return model


def denoise(
    model: I2VModel, runner: LayerRunner, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Tensor:
    """Return the prediction for fixed random inputs."""
    family, unet = family_of(model.architecture), model.modules["unet"]
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    inputs = {
        "encoder_hidden_states": random(1, 16, 32),
        "image_embeddings": random(1, 1, 32),
        "image_latents": random(*family.facts.latent_size(SIZE).shape_bcthw),
        "fps": torch.tensor([8.0], device=device),
    }
    latents = random(*family.facts.latent_size(SIZE).shape_bcthw)
    with torch.no_grad(), family.chunked(unet, SETTINGS, runner=runner, on_chunk=lambda: None):
        return family.denoise(unet, latents, torch.tensor(500, device=device), inputs)


def result(model: I2VModel, put: Put, storage: WeightStorage, dtype: torch.dtype = torch.float32) -> Tensor:
    with put(model.modules["unet"], CPU, dtype, storage) as runner:
        return denoise(model, runner, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("storage", "least", "most"), [(WeightStorage.INT8, 0.002, 0.02), (WeightStorage.FP8, 0.01, 0.05)]
)
def test_one_prediction_is_as_close_as_the_format_allows(
    model: I2VModel, storage: WeightStorage, least: float, most: float, dtype: torch.dtype
) -> None:
    """The relative error of a weight is about 0.7 % in int8, and 2.6 % in fp8 with its 4 significant bits."""
    exact = result(model, resident, WeightStorage.AS_COMPUTED, dtype)
    inside = result(model, resident, storage, dtype)
    assert least <= ((inside - exact).norm() / exact.norm()).item() <= most


@eight_bits
def test_streamed_and_resident_weights_give_the_same(model: I2VModel, storage: WeightStorage) -> None:
    assert torch.equal(result(model, streamed, storage), result(model, resident, storage))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@eight_bits
def test_resident_weights_take_less_than_the_exact_way(
    model: I2VModel, storage: WeightStorage, dtype: torch.dtype
) -> None:
    unet = model.modules["unet"]
    peaks: dict[WeightStorage, int] = {}
    for way in (WeightStorage.AS_COMPUTED, storage):
        with StorageMeter() as meter, resident(unet, CPU, dtype, way) as runner, meter.counted(unet):
            denoise(model, runner, dtype)
            peaks[way] = meter.peak_bytes
    saved_bytes = sum(weight.numel() for weight in reducible(unet)) * (dtype.itemsize - 1)
    # The largest layer is there twice, and a scale a channel.
    assert peaks[storage] < peaks[WeightStorage.AS_COMPUTED] - saved_bytes / 2


@eight_bits
def test_the_traffic_shrinks_too(model: I2VModel, storage: WeightStorage) -> None:
    loaded: list[int] = []
    for way in (WeightStorage.AS_COMPUTED, storage):
        with streamed(model.modules["unet"], CPU, torch.bfloat16, way) as stream:
            denoise(model, stream, torch.bfloat16)
            loaded.append(stream.loaded_bytes)
    assert 0.5 * loaded[0] <= loaded[1] <= 0.55 * loaded[0]


@every_way
@eight_bits
def test_the_module_comes_back_bit_for_bit(model: I2VModel, put: Put, storage: WeightStorage) -> None:
    unet = model.modules["unet"]
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in unet.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in unet.named_modules()}

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    hook = unet.get_submodule("mid_block.resnets.1.conv1").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="inside"):
        result(model, put, storage, torch.bfloat16)
    hook.remove()
    for name, tensor in unet.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == attributes


def restored(weight: Tensor, storage: WeightStorage) -> Tensor:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.weight.copy_(weight)
    stored = StoredWeights(nn.Sequential(layer), CPU, torch.float32, storage)
    values = stored.reduced(layer.weight)
    assert values is not None
    assert values.itemsize == 1
    assert stored.reduced(layer.bias) is None
    return stored.dequantized(layer.weight, values)


@eight_bits
def test_a_channel_may_be_zero_tiny_or_huge(storage: WeightStorage) -> None:
    """A channel has a scale of its own, so another's outliers do not touch it."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight *= torch.tensor([[0.0], [1e-6], [1.0], [1e6]])
    error = (restored(weight, storage) - weight).abs()
    peaks = weight.abs().amax(dim=1, keepdim=True)
    # Half of int8's step, and of E4M3's step at its largest values.
    assert (error <= peaks * {WeightStorage.INT8: 0.5 / 127, WeightStorage.FP8: 16 / 448}[storage] * 1.001).all()
    assert (error[1:] > 0).any(dim=1).all()


def test_layers_that_diffusers_skips_are_skipped(model: I2VModel, monkeypatch: pytest.MonkeyPatch) -> None:
    unet: Any = model.modules["unet"]
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    chosen = {names[id(weight)] for weight in reducible(unet)}
    assert "conv_in.weight" in chosen
    assert "mid_block.temp_convs.0.conv4.3.weight" in chosen
    assert not any("norm" in name or name.endswith("bias") for name in chosen)
    assert all(parameter.ndim == 1 for name, parameter in unet.named_parameters() if name not in chosen)
    monkeypatch.setattr(type(unet), "_skip_layerwise_casting_patterns", ["^mid_block$"], raising=False)
    fewer = {names[id(weight)] for weight in reducible(unet)}
    assert chosen - fewer == {name for name in chosen if name.startswith("mid_block.")}


def test_without_torchao_int8_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingPackageError, match="pip install torchao"):
        restored(torch.ones(2, 2), WeightStorage.INT8)
    restored(torch.ones(2, 2), WeightStorage.FP8)


@pytest.mark.gpu
@every_way
@eight_bits
def test_on_a_gpu_it_is_as_close(model: I2VModel, put: Put, storage: WeightStorage) -> None:
    exact = result(model, resident, WeightStorage.AS_COMPUTED)
    unet = model.modules["unet"]
    cuda = torch.device("cuda")
    with put(unet, cuda, torch.float32, storage) as runner:
        found = denoise(model, runner, device=cuda).cpu()
    assert 0.002 <= ((found - exact).norm() / exact.norm()).item() <= 0.05
