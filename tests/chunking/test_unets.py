"""Properties of the two UNets alone: FreeU, attention processors of their own, temporal layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from i2v_core.chunking import ChunkSettings, LayerCall, LayerRunner
from i2v_core.memory.meter import fused_attention
from tests.measures import relative_rms
from tests.subjects import DenoiserSubject, Inputs, Subject

MakeInputs = Callable[..., Inputs]

SMALL = ChunkSettings(workspace_bytes=20_000)

of_both = pytest.mark.parametrize("subject", ["i2vgen-xl", "svd"], indirect=True)


@of_both
def test_channels_last_weights(kind: DenoiserSubject, make_inputs: MakeInputs) -> None:
    unet = kind.make()
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 4 and name.startswith(("down_blocks", "up_blocks", "conv")):
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    inputs = make_inputs(batch=2, frames=3)
    with torch.no_grad():
        plain = unet(**inputs).sample
    for workspace_bytes in (1, 300_000):
        with kind.chunked(unet, ChunkSettings(workspace_bytes=workspace_bytes)):
            assert relative_rms(unet(**inputs).sample, plain) <= 1e-5


@of_both
def test_the_models_attention_processors_run(kind: DenoiserSubject, make_inputs: MakeInputs) -> None:
    calls: list[str] = []

    class Recording(AttnProcessor2_0):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(names[attn])
            return super().__call__(attn, *args, **kwargs)

    unet = kind.make()
    unet.set_attn_processor(Recording())
    names = {module: name for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))}
    with kind.chunked(unet, SMALL):
        unet(**make_inputs())
    assert set(calls) == set(names.values())


@of_both
def test_calls_tell_their_kind_and_chunks(kind: DenoiserSubject, make_inputs: MakeInputs) -> None:
    unet, calls = kind.make(), list[LayerCall]()

    class Recording(LayerRunner):
        def enter(self, call: LayerCall) -> Any:
            calls.append(call)
            return super().enter(call)

    with kind.chunked(unet, ChunkSettings(workspace_bytes=60_000), runner=Recording()):
        unet(**make_inputs(batch=2, frames=5, latent_height=8, latent_width=8))
    over_time = next(call for call in calls if call.kind.startswith("temporal_") and call.total == 8 * 8)
    assert over_time.unit == "pixel"
    assert not over_time.unchunked
    first_resnet = next(call for call in calls if call.kind == "resnet")
    assert first_resnet.unit == "frame"
    assert first_resnet.total == 2 * 5
    upsampling = [call for call in calls if call.kind == "resnet" and len(call.modules) == 2]
    assert [call.modules[0] for call in upsampling] == [block.upsamplers[0] for block in unet.up_blocks[:-1]]
    assert all(1 <= call.chunk_size <= call.total for call in calls)
    assert all(call.chunk_size == call.total for call in calls if call.unchunked)


@of_both
def test_attention_batches_stay_within_what_cuda_takes(subject: Subject, kind: DenoiserSubject) -> None:
    """Uses 256 × 264 latent pixels, more than the 65,535 that temporal attention can have in a batch."""
    batches: list[int] = []

    class Recording(AttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            batches.append(len(hidden_states))
            return super().__call__(attn, hidden_states, *args, **kwargs)

    unet: Any = kind.make(torch.float16, **kind.other_layout, cross_attention_dim=1024)
    nn.Module.to(unet, "meta")
    unet.set_attn_processor(Recording())
    with fused_attention(), kind.chunked(unet, ChunkSettings(workspace_bytes=2**60)):
        unet(**subject.published_inputs(1, subject.size(256 * 8, 264 * 8, 2), torch.float16))
    assert max(batches) == 256 * 264 / 2


@pytest.mark.parametrize("subject", ["i2vgen-xl"], indirect=True)
def test_refuses_freeu(kind: DenoiserSubject) -> None:
    unet = kind.make()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    with pytest.raises(ValueError, match="disable_freeu"), kind.chunked(unet, SMALL):
        pass
    unet.disable_freeu()
    with kind.chunked(unet, SMALL):
        pass
