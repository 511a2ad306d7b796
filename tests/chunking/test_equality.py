"""Chunked execution gives the plain forward's result, at any size, chunk and precision, and leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i2v_core.chunking import ChunkSettings
from tests.chunking.subjects import Inputs, Subject, chunked

EVERYTHING = 2**40
SMALLEST = 1

MakeInputs = Callable[..., Inputs]
RelativeRms = Callable[[torch.Tensor, torch.Tensor], float]


def plain(unet: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return unet(**inputs).sample


def in_chunks(unet: Any, inputs: Inputs, workspace_bytes: int, park_skips: bool = False) -> torch.Tensor:
    with chunked(unet, ChunkSettings(workspace_bytes=workspace_bytes, park_skips=park_skips)):
        return unet(**inputs).sample


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("park_skips", [False, True])
@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 20_000, 200_000])
def test_equals_the_plain_forward(
    unet: Any,
    make_inputs: MakeInputs,
    relative_rms: RelativeRms,
    workspace_bytes: int,
    park_skips: bool,
    batch: int,
) -> None:
    inputs = make_inputs(batch=batch)
    result = in_chunks(unet, inputs, workspace_bytes, park_skips)
    assert relative_rms(result, plain(unet, inputs)) <= 1e-5


def test_a_large_workspace_runs_every_layer_as_it_is(subject: Subject, unet: Any, make_inputs: MakeInputs) -> None:
    if not subject.runs_layers_whole:
        pytest.skip("its layers never run by their own forward")
    inputs = make_inputs(batch=2)
    assert torch.equal(in_chunks(unet, inputs, EVERYTHING), plain(unet, inputs))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 9),
    latent_height=st.integers(4, 17),
    latent_width=st.integers(4, 17),
    log_workspace=st.floats(math.log(1_000), math.log(20_000_000)),
    park_skips=st.booleans(),
)
def test_equals_the_plain_forward_at_any_size(
    unet: Any,
    make_inputs: MakeInputs,
    relative_rms: RelativeRms,
    batch: int,
    frames: int,
    latent_height: int,
    latent_width: int,
    log_workspace: float,
    park_skips: bool,
) -> None:
    inputs = make_inputs(batch=batch, frames=frames, latent_height=latent_height, latent_width=latent_width)
    result = in_chunks(unet, inputs, int(math.exp(log_workspace)), park_skips)
    assert relative_rms(result, plain(unet, inputs)) <= 1e-5


@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 50_000, EVERYTHING])
def test_equals_the_plain_forward_of_the_published_layout(
    subject: Subject,
    make_inputs: MakeInputs,
    relative_rms: RelativeRms,
    workspace_bytes: int,
) -> None:
    """Four levels, attention at the outer three, two layers a block: the middle block's input is a skip as well."""
    unet = subject.make(**subject.published_layout)
    inputs = make_inputs(batch=2, frames=3, latent_height=18, latent_width=11)
    for park_skips in (False, True):
        result = in_chunks(unet, inputs, workspace_bytes, park_skips)
        assert relative_rms(result, plain(unet, inputs)) <= 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 50_000])
def test_half_precision_is_as_close_to_fp32_as_the_plain_forward(
    unet: Any,
    make_unet: Callable[..., Any],
    make_inputs: MakeInputs,
    relative_rms: RelativeRms,
    dtype: torch.dtype,
    tolerance: float,
    workspace_bytes: int,
) -> None:
    half_unet, half_inputs = make_unet(dtype), make_inputs(batch=2, dtype=dtype)
    reference = plain(unet, make_inputs(batch=2))
    result, plain_result = in_chunks(half_unet, half_inputs, workspace_bytes), plain(half_unet, half_inputs)
    assert result.dtype is dtype
    assert relative_rms(result, plain_result) <= tolerance
    assert relative_rms(result, reference) <= 1.1 * relative_rms(plain_result, reference)


def test_signature_and_result_types_are_the_models_own(
    subject: Subject, unet: Any, make_inputs: MakeInputs, relative_rms: RelativeRms
) -> None:
    inputs = make_inputs()
    expected = plain(unet, inputs)
    with chunked(unet, ChunkSettings(workspace_bytes=EVERYTHING)):
        by_position = unet(*inputs.values(), return_dict=False)
        with_number = unet(**(inputs | {"timestep": 501}), **subject.more_arguments)
    assert isinstance(by_position, tuple)
    assert relative_rms(by_position[0], expected) <= 1e-5
    assert torch.equal(by_position[0], with_number.sample)
    assert with_number.sample.stride() == expected.stride()


def test_channels_last_weights(
    make_unet: Callable[..., Any], make_inputs: MakeInputs, relative_rms: RelativeRms
) -> None:
    unet = make_unet()
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 4 and name.startswith(("down_blocks", "up_blocks", "conv")):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    inputs = make_inputs(batch=2, frames=3)
    for workspace_bytes in (SMALLEST, 300_000):
        assert relative_rms(in_chunks(unet, inputs, workspace_bytes), plain(unet, inputs)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("park_skips", [False, True])
def test_equals_the_plain_forward_on_cuda(
    make_unet: Callable[..., Any], make_inputs: MakeInputs, relative_rms: RelativeRms, park_skips: bool
) -> None:
    """Parked skips go through pinned memory, asynchronously: a missing wait would show as a wrong result."""
    unet: Any = make_unet(torch.float16)
    unet.to("cuda")
    inputs = make_inputs(batch=2, frames=8, latent_height=48, latent_width=40, dtype=torch.float16)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    result = in_chunks(unet, inputs, 8_000_000, park_skips)
    assert relative_rms(result, plain(unet, inputs)) <= 1e-2
