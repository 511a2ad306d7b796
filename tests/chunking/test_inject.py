"""Chunked execution leaves the model and the caller's tensors unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from i2v_core.chunking import ChunkSettings
from tests.subjects import DenoiserSubject, Inputs

MakeInputs = Callable[..., Inputs]

SMALL = ChunkSettings(workspace_bytes=20_000)


class StopError(Exception):
    pass


def attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return all attributes of a module tree."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(part).items()}
        for name, part in module.named_modules()
    }


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_model_is_the_same_afterwards(kind: DenoiserSubject, denoiser: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    attributes_before, weights_before = attributes(denoiser), weights(denoiser)
    with torch.no_grad():
        plain_before = denoiser(**inputs).sample
        with kind.chunked(denoiser, SMALL):
            denoiser(**inputs)
        assert attributes(denoiser) == attributes_before
        assert all(torch.equal(tensor, weights_before[name]) for name, tensor in denoiser.state_dict().items())
        assert torch.equal(denoiser(**inputs).sample, plain_before)


def test_the_callers_tensors_are_not_modified(kind: DenoiserSubject, denoiser: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(batch=2)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    for workspace_bytes in (1, 2**40):
        with kind.chunked(denoiser, ChunkSettings(workspace_bytes=workspace_bytes)):
            denoiser(**inputs)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in inputs.items())


def test_on_chunk_may_stop_at_any_chunk(kind: DenoiserSubject, denoiser: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(frames=2)
    attributes_before = attributes(denoiser)
    with torch.no_grad():
        plain = denoiser(**inputs).sample
    chunks = 0

    def count() -> None:
        nonlocal chunks
        chunks += 1

    with kind.chunked(denoiser, SMALL, on_chunk=count):
        denoiser(**inputs)
    assert chunks > 20

    for last in range(1, chunks, chunks // 8):
        remaining = last

        def stop() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise StopError

        with pytest.raises(StopError), kind.chunked(denoiser, SMALL, on_chunk=stop):
            denoiser(**inputs)
        assert attributes(denoiser) == attributes_before
    with torch.no_grad():
        assert torch.equal(denoiser(**inputs).sample, plain)


def test_an_error_in_the_body_restores_a_forward_that_was_set_before(kind: DenoiserSubject) -> None:
    denoiser: Any = kind.make()

    def mine() -> None: ...

    def fail_inside() -> None:
        with kind.chunked(denoiser, SMALL):
            assert denoiser.forward is not mine
            raise StopError

    denoiser.forward = mine
    with pytest.raises(StopError):
        fail_inside()
    assert denoiser.__dict__["forward"] is mine


def test_contexts_nest(kind: DenoiserSubject, denoiser: Any) -> None:
    with kind.chunked(denoiser, SMALL):
        outer = denoiser.forward
        with kind.chunked(denoiser, SMALL):
            assert denoiser.forward is not outer
        assert denoiser.forward is outer
    assert "forward" not in vars(denoiser)


def test_refuses_models_that_it_cannot_run_exactly(kind: DenoiserSubject) -> None:
    denoiser = kind.make()
    with pytest.raises(TypeError, match="Linear"), kind.chunked(nn.Linear(1, 1), SMALL):
        pass
    with pytest.raises(ValueError, match="eval"), kind.chunked(denoiser.train(), SMALL):
        pass
    with pytest.raises(ValueError, match="workspace_bytes"):
        ChunkSettings(workspace_bytes=0)
