"""Weight streaming: equal output, weights on the device, and traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from i2v_core.chunking import ChunkSettings, chunked
from i2v_core.families import I2VModel, VideoSize, family_of, load_model
from i2v_core.memory.meter import StorageMeter
from i2v_core.placement.placed import placed
from i2v_core.placement.streaming import streamed, streamed_leaves
from tests.emulated_cuda import CARD, emulated_cuda

DEVICE = torch.device("cpu")
SETTINGS = ChunkSettings(workspace_bytes=64 * 1024)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> I2VModel:
    return load_model(tiny_folder)


def denoise(model: I2VModel, dtype: torch.dtype = torch.float32) -> Any:
    """Return the denoiser's result for fixed random inputs."""
    family = family_of(model.architecture)
    size = VideoSize(width_pixels=64, height_pixels=64, frames=3)
    latent = family.facts.latent_size(size)
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = {
        "encoder_hidden_states": random(2, 16, 32),
        "image_embeddings": random(2, 1, 32),
        "image_latents": random(2, *latent.shape_bcthw[1:]),
        "fps": torch.tensor([8.0, 8.0]),
    }
    latents = random(2, *latent.shape_bcthw[1:])
    unet = model.modules["unet"]
    return lambda: family.denoise(unet, latents, torch.tensor(500), inputs)


def weights_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(tensor.numel() * dtype.itemsize for tensor in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_streamed_denoiser_gives_what_a_placed_one_gives(model: I2VModel, dtype: torch.dtype) -> None:
    unet, call = model.modules["unet"], denoise(model, dtype)
    with torch.no_grad(), placed(unet, DEVICE, dtype), chunked(unet, SETTINGS):
        expected = call()
    with torch.no_grad(), streamed(unet, DEVICE, dtype) as stream, chunked(unet, SETTINGS, runner=stream):
        for _ in range(2):
            assert (call() - expected).norm() <= 1e-6 * expected.norm()


def test_every_weight_is_loaded_once_a_pass(model: I2VModel) -> None:
    unet, call = model.modules["unet"], denoise(model)
    with torch.no_grad(), streamed(unet, DEVICE, torch.float32) as stream, chunked(unet, SETTINGS, runner=stream):
        call()
        assert stream.loaded_bytes == weights_bytes(unet, torch.float32)
        call()  # from here on the first layer of the next pass is fetched ahead
        before = stream.loaded_bytes
        call()
        assert stream.loaded_bytes - before == weights_bytes(unet, torch.float32)


def test_only_two_layers_are_on_the_device_at_a_time(model: I2VModel) -> None:
    unet, call = model.modules["unet"], denoise(model)
    peaks: dict[str, int] = {}
    with torch.no_grad(), chunked(unet, SETTINGS), StorageMeter() as meter, placed(unet, DEVICE, torch.float32):
        with meter.counted(unet):
            call()
        peaks["placed"] = meter.peak_bytes
    with torch.no_grad(), StorageMeter() as meter, streamed(unet, DEVICE, torch.float32) as stream:
        with chunked(unet, SETTINGS, runner=stream):
            call()
        peaks["streamed"] = meter.peak_bytes
    assert peaks["streamed"] < peaks["placed"] - weights_bytes(unet, torch.float32) / 2


@pytest.mark.parametrize("component", ["text_encoder", "image_encoder", "vae"])
def test_other_components_stream_leaf_by_leaf(model: I2VModel, component: str) -> None:
    module: Any = model.modules[component]
    run = {
        "text_encoder": lambda: module(torch.arange(16)[None]).last_hidden_state,
        "image_encoder": lambda: module(torch.ones(1, 3, 32, 32)).image_embeds,
        "vae": lambda: module.decode(torch.ones(1, 4, 8, 8)).sample,
    }[component]
    with torch.no_grad():
        expected = run()
        with StorageMeter() as meter, streamed_leaves(module, DEVICE, torch.float32) as stream:
            assert torch.equal(run(), expected)
    assert 0 < stream.loaded_bytes <= 1.05 * weights_bytes(module, torch.float32) + 1024
    assert meter.current_bytes <= expected.nbytes + 512
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize("stream", [streamed, streamed_leaves])
def test_the_module_comes_back_bit_for_bit_from_an_error(model: I2VModel, stream: Any) -> None:
    unet = model.modules["unet"]
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in unet.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in unet.named_modules()}
    with pytest.raises(RuntimeError, match="inside"), stream(unet, DEVICE, torch.bfloat16):
        raise RuntimeError("inside")
    for name, tensor in unet.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert {name: set(vars(module)) for name, module in unet.named_modules()} == attributes


def test_a_layer_that_follows_itself_is_not_fetched_from_the_copy_that_it_frees() -> None:
    layer = nn.Linear(8, 8)
    with torch.no_grad(), emulated_cuda() as card:
        with streamed_leaves(layer, CARD, torch.float32) as stream:
            for _ in range(3):
                layer(torch.ones(1, 8, device=CARD))
        assert stream.loaded_bytes == 4 * weights_bytes(layer, torch.float32)
        assert not card.races, card.races[0]


@pytest.mark.gpu
def test_on_a_gpu_the_next_layer_is_fetched_ahead_with_the_same_result(model: I2VModel) -> None:
    device = torch.device("cuda")
    unet = model.modules["unet"]
    family = family_of(model.architecture)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 3, 8, 8, generator=generator).to(device)
    inputs = {
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=generator).to(device),
        "image_embeddings": torch.randn(2, 1, 32, generator=generator).to(device),
        "image_latents": torch.randn(2, 4, 3, 8, 8, generator=generator).to(device),
        "fps": torch.tensor([8.0, 8.0], device=device),
    }

    def call() -> torch.Tensor:
        return family.denoise(unet, latents, torch.tensor(500), inputs)

    with torch.no_grad(), placed(unet, device, torch.float32), chunked(unet, SETTINGS):
        expected = call()
    with torch.no_grad(), streamed(unet, device, torch.float32) as stream, chunked(unet, SETTINGS, runner=stream):
        before = 0
        for _ in range(3):
            before = stream.loaded_bytes
            assert (call() - expected).norm() <= 1e-6 * expected.norm()
    assert stream.loaded_bytes - before == weights_bytes(unet, torch.float32)
