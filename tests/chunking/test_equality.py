"""Chunked execution gives the plain forward's result, at any size, chunk size and precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from i2v_core.chunking import ChunkSettings
from tests.measures import relative_rms
from tests.subjects import DenoiserSubject, Inputs

EVERYTHING = 2**40
SMALLEST = 1

MakeInputs = Callable[..., Inputs]


def plain(denoiser: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(**inputs).sample


InChunks = Callable[..., torch.Tensor]


@pytest.fixture(scope="session")
def in_chunks(kind: DenoiserSubject) -> InChunks:
    def run(denoiser: Any, inputs: Inputs, workspace_bytes: int, offload_skips: bool = False) -> torch.Tensor:
        with kind.chunked(denoiser, ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=offload_skips)):
            return denoiser(**inputs).sample

    return run


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 20_000, 200_000])
def test_equals_the_plain_forward(
    kind: DenoiserSubject,
    denoiser: Any,
    in_chunks: InChunks,
    make_inputs: MakeInputs,
    workspace_bytes: int,
    batch: int,
) -> None:
    inputs = make_inputs(batch=batch)
    for offload_skips in kind.offload_choices:
        result = in_chunks(denoiser, inputs, workspace_bytes, offload_skips)
        assert relative_rms(result, plain(denoiser, inputs)) <= 1e-5


@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 100_000, EVERYTHING])
def test_gives_the_same_bits_where_its_layers_allow(
    kind: DenoiserSubject, denoiser: Any, in_chunks: InChunks, make_inputs: MakeInputs, workspace_bytes: int
) -> None:
    """Layers that run unchunked or token by token give the same bits; others sum in another order."""
    inputs = make_inputs(batch=2)
    same = torch.equal(in_chunks(denoiser, inputs, workspace_bytes), plain(denoiser, inputs))
    assert same or kind.same_bits_from is None or workspace_bytes < kind.same_bits_from


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 2),
    frames=st.integers(1, 9),
    latent_height=st.integers(4, 17),
    latent_width=st.integers(4, 17),
    log_workspace=st.floats(math.log(1_000), math.log(20_000_000)),
    offload_skips=st.booleans(),
)
def test_equals_the_plain_forward_at_any_size(
    denoiser: Any,
    in_chunks: InChunks,
    make_inputs: MakeInputs,
    batch: int,
    frames: int,
    latent_height: int,
    latent_width: int,
    log_workspace: float,
    offload_skips: bool,
) -> None:
    inputs = make_inputs(batch=batch, frames=frames, latent_height=latent_height, latent_width=latent_width)
    result = in_chunks(denoiser, inputs, int(math.exp(log_workspace)), offload_skips)
    assert relative_rms(result, plain(denoiser, inputs)) <= 1e-5


@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 50_000, EVERYTHING])
def test_equals_the_plain_forward_of_another_layout(
    kind: DenoiserSubject,
    in_chunks: InChunks,
    make_inputs: MakeInputs,
    workspace_bytes: int,
) -> None:
    """Uses other configs: for UNets, four levels and two layers a block, so that the middle block's input is also a
    skip.
    """
    denoiser = kind.make(**kind.other_layout)
    inputs = make_inputs(batch=2, frames=3, latent_height=18, latent_width=11)
    for offload_skips in kind.offload_choices:
        result = in_chunks(denoiser, inputs, workspace_bytes, offload_skips)
        assert relative_rms(result, plain(denoiser, inputs)) <= 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("workspace_bytes", [SMALLEST, 50_000])
def test_half_precision_is_as_close_to_fp32_as_the_plain_forward(
    kind: DenoiserSubject,
    denoiser: Any,
    in_chunks: InChunks,
    make_inputs: MakeInputs,
    dtype: torch.dtype,
    tolerance: float,
    workspace_bytes: int,
) -> None:
    half, half_inputs = kind.make(dtype), make_inputs(batch=2, dtype=dtype)
    reference = plain(denoiser, make_inputs(batch=2))
    result, plain_result = in_chunks(half, half_inputs, workspace_bytes), plain(half, half_inputs)
    assert result.dtype is dtype
    assert relative_rms(result, plain_result) <= tolerance
    assert relative_rms(result, reference) <= 1.1 * relative_rms(plain_result, reference)


def test_signature_and_result_types_are_the_models_own(
    kind: DenoiserSubject, denoiser: Any, make_inputs: MakeInputs
) -> None:
    inputs = make_inputs()
    expected = plain(denoiser, inputs)
    at_once = inputs["timestep"].ndim == 0
    with kind.chunked(denoiser, ChunkSettings(workspace_bytes=EVERYTHING)):
        by_position = denoiser(*inputs.values(), return_dict=False)
        other = inputs | ({"timestep": 501} if at_once else {})
        with_more = denoiser(**other, **kind.more_arguments)
    assert isinstance(by_position, tuple)
    assert relative_rms(by_position[0], expected) <= 1e-5
    assert torch.equal(by_position[0], with_more.sample)
    assert with_more.sample.stride() == expected.stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_equals_the_plain_forward_on_cuda(kind: DenoiserSubject, in_chunks: InChunks, make_inputs: MakeInputs) -> None:
    """Offloaded skips go through pinned memory asynchronously, so a missing wait would show as a wrong result."""
    denoiser: Any = kind.make(torch.float16)
    denoiser.to("cuda")
    inputs = make_inputs(batch=2, frames=8, latent_height=48, latent_width=40, dtype=torch.float16)
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    for offload_skips in kind.offload_choices:
        result = in_chunks(denoiser, inputs, 8_000_000, offload_skips)
        assert relative_rms(result, plain(denoiser, inputs)) <= 1e-2
