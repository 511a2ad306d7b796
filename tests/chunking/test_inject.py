"""Chunked execution leaves the model, and what the caller holds, as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from i2v_core.chunking import ChunkSettings
from tests.chunking.subjects import SUBJECTS, Inputs, Subject, chunked

MakeUnet = Callable[..., Any]
MakeInputs = Callable[..., Inputs]

SMALL = ChunkSettings(workspace_bytes=20_000)


class StopError(Exception):
    pass


def attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """All that a module tree holds, by identity."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(part).items()}
        for name, part in module.named_modules()
    }


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_the_model_is_the_same_afterwards(unet: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs()
    attributes_before, weights_before = attributes(unet), weights(unet)
    with torch.no_grad():
        plain_before = unet(**inputs).sample
        with chunked(unet, SMALL):
            unet(**inputs)
        assert attributes(unet) == attributes_before
        assert all(torch.equal(tensor, weights_before[name]) for name, tensor in unet.state_dict().items())
        assert torch.equal(unet(**inputs).sample, plain_before)


def test_the_callers_tensors_are_not_modified(unet: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(batch=2)
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    for workspace_bytes in (1, 2**40):
        with chunked(unet, ChunkSettings(workspace_bytes=workspace_bytes)):
            unet(**inputs)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in inputs.items())


def test_on_chunk_may_stop_at_any_chunk(unet: Any, make_inputs: MakeInputs) -> None:
    inputs = make_inputs(frames=2)
    attributes_before = attributes(unet)
    with torch.no_grad():
        plain = unet(**inputs).sample
    chunks = 0

    def count() -> None:
        nonlocal chunks
        chunks += 1

    with chunked(unet, SMALL, on_chunk=count):
        unet(**inputs)
    assert chunks > 100

    for last in range(1, chunks, 37):
        remaining = last

        def stop() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                raise StopError

        with pytest.raises(StopError), chunked(unet, SMALL, on_chunk=stop):
            unet(**inputs)
        assert attributes(unet) == attributes_before
    with torch.no_grad():
        assert torch.equal(unet(**inputs).sample, plain)


def test_an_error_in_the_body_restores_a_forward_that_was_set_before(make_unet: MakeUnet) -> None:
    unet: Any = make_unet()

    def mine() -> None: ...

    def fail_inside() -> None:
        with chunked(unet, SMALL):
            assert unet.forward is not mine
            raise StopError

    unet.forward = mine
    with pytest.raises(StopError):
        fail_inside()
    assert unet.__dict__["forward"] is mine


def test_contexts_nest(unet: Any) -> None:
    with chunked(unet, SMALL):
        outer = unet.forward
        with chunked(unet, SMALL):
            assert unet.forward is not outer
        assert unet.forward is outer
    assert "forward" not in vars(unet)


def test_the_models_attention_processors_run(make_unet: MakeUnet, make_inputs: MakeInputs) -> None:
    calls: list[str] = []

    class Recording(AttnProcessor2_0):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(names[attn])
            return super().__call__(attn, *args, **kwargs)

    unet = make_unet()
    unet.set_attn_processor(Recording())
    names = {module: name for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))}
    with chunked(unet, SMALL):
        unet(**make_inputs())
    assert set(calls) == set(names.values())


def test_refuses_what_it_cannot_run_exactly(subject: Subject, make_unet: MakeUnet) -> None:
    unet = make_unet()
    with pytest.raises(TypeError, match="Linear"), subject.chunked(nn.Linear(1, 1), SMALL):
        pass
    with pytest.raises(ValueError, match="eval"), chunked(unet.train(), SMALL):
        pass
    with pytest.raises(ValueError, match="workspace_bytes"):
        ChunkSettings(workspace_bytes=0)


def test_refuses_freeu() -> None:
    unet = SUBJECTS["i2vgen-xl"].make()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    with pytest.raises(ValueError, match="disable_freeu"), chunked(unet, SMALL):
        pass
    unet.disable_freeu()
    with chunked(unet, SMALL):
        pass
