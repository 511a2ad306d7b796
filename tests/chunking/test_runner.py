"""Layer runners: every weight is requested once a forward, and used only while it is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from i2v_core.chunking import ChunkSettings, LayerCall, LayerRunner
from tests.subjects import DenoiserSubject, Inputs


def tensors(*modules: nn.Module) -> list[torch.Tensor]:
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


class Streaming(LayerRunner):
    """Replaces weights by NaN, but for those of the layer that runs."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.kept = {tensor: tensor.detach().clone() for tensor in tensors(denoiser)}
        self.calls: list[LayerCall] = []
        for tensor in self.kept:
            tensor.fill_(torch.nan)

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        self.calls.append(call)
        for tensor in tensors(*call.modules):
            tensor.copy_(self.kept[tensor])
        yield
        for tensor in tensors(*call.modules):
            tensor.fill_(torch.nan)


@pytest.mark.parametrize("workspace_bytes", [1, 100_000, 2**40])
def test_each_weight_is_brought_in_once_and_suffices(
    kind: DenoiserSubject, make_inputs: Callable[..., Inputs], workspace_bytes: int
) -> None:
    denoiser, inputs = kind.make(), make_inputs(batch=2)
    settings = ChunkSettings(workspace_bytes=workspace_bytes)
    with kind.chunked(denoiser, settings):
        expected = denoiser(**inputs).sample
    streaming = Streaming(denoiser)
    with kind.chunked(denoiser, settings, runner=streaming):
        assert torch.equal(denoiser(**inputs).sample, expected)
    brought_in = Counter(tensor for call in streaming.calls for tensor in tensors(*call.modules))
    assert brought_in == Counter(tensors(denoiser))
