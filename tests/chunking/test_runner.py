"""The seam: every weight is asked for once a forward, and used only while it is in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from i2v_core.chunking import ChunkSettings, LayerCall, LayerRunner
from tests.chunking.subjects import Inputs, chunked


def parameters(call: LayerCall) -> list[nn.Parameter]:
    return [parameter for module in call.modules for parameter in module.parameters()]


class Streaming(LayerRunner):
    """Keeps weights elsewhere, not a number in their place, but for the layer that runs."""

    def __init__(self, unet: nn.Module) -> None:
        self.kept = {parameter: parameter.detach().clone() for parameter in unet.parameters()}
        self.calls: list[LayerCall] = []
        for parameter in self.kept:
            parameter.fill_(torch.nan)

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        self.calls.append(call)
        for parameter in parameters(call):
            parameter.copy_(self.kept[parameter])
        yield
        for parameter in parameters(call):
            parameter.fill_(torch.nan)


@pytest.mark.parametrize("workspace_bytes", [1, 100_000, 2**40])
def test_each_weight_is_brought_in_once_and_suffices(
    make_unet: Callable[..., Any], make_inputs: Callable[..., Inputs], workspace_bytes: int
) -> None:
    unet, inputs = make_unet(), make_inputs(batch=2)
    settings = ChunkSettings(workspace_bytes=workspace_bytes)
    with chunked(unet, settings):
        expected = unet(**inputs).sample
    streaming = Streaming(unet)
    with chunked(unet, settings, runner=streaming):
        assert torch.equal(unet(**inputs).sample, expected)
    brought_in = Counter(parameter for call in streaming.calls for parameter in parameters(call))
    assert brought_in == Counter(unet.parameters())


def test_calls_say_what_they_are_and_how_they_are_cut(unet: Any, make_inputs: Callable[..., Inputs]) -> None:
    calls: list[LayerCall] = []

    class Recording(LayerRunner):
        def enter(self, call: LayerCall) -> Any:
            calls.append(call)
            return super().enter(call)

    with chunked(unet, ChunkSettings(workspace_bytes=60_000), runner=Recording()):
        unet(**make_inputs(batch=2, frames=5, latent_height=8, latent_width=8))
    over_time = next(call for call in calls if call.kind.startswith("temporal_") and call.total == 8 * 8)
    assert over_time.unit == "pixel"
    assert not over_time.whole
    first_resnet = next(call for call in calls if call.kind == "resnet")
    assert first_resnet.unit == "frame"
    assert first_resnet.total == 2 * 5
    upsampling = [call for call in calls if call.kind == "resnet" and len(call.modules) == 2]
    assert [call.modules[0] for call in upsampling] == [block.upsamplers[0] for block in unet.up_blocks[:-1]]
    assert all(1 <= call.chunk_size <= call.total for call in calls)
    assert all(call.chunk_size == call.total for call in calls if call.whole)
