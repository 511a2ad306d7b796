"""Properties of the Wan transformer alone: parts in fp32, a time step for each token, identical blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from i2v_core.chunking import ChunkSettings, DistinctChunks
from i2v_core.families.wan.transformer import chunked_wan
from i2v_core.memory.meter import StorageMeter, fused_attention
from i2v_core.units import MIB
from tests.subjects import SUBJECTS, Inputs, Subject

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = 2**40
WAN_21, TI2V = SUBJECTS["wan2.1-i2v"].denoiser, SUBJECTS["wan2.2-ti2v"].denoiser


def plain(model: Any, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def in_chunks(model: Any, inputs: Inputs, workspace_bytes: int) -> torch.Tensor:
    with chunked_wan(model, ChunkSettings(workspace_bytes=workspace_bytes)):
        return model(**inputs).sample


def test_norms_and_angles_may_be_fp32_in_a_model_of_half_precision() -> None:
    """Loads as diffusers does, since rounding would harm positions and time steps most."""
    model = WAN_21.make(torch.bfloat16)
    for name, part in model.named_modules():
        if name.endswith(("rope", "time_embedder", "norm2")):
            nn.Module.to(part, torch.float32)
    inputs = WAN_21.inputs(dtype=torch.bfloat16)
    assert torch.equal(in_chunks(model, inputs, 50_000), plain(model, inputs))


def test_time_steps_may_change_from_token_to_token() -> None:
    model = TI2V.make()
    inputs = TI2V.inputs(batch=2)
    tokens = inputs["timestep"].shape[1]
    inputs["timestep"] = torch.randint(0, 4, (2, tokens), generator=torch.Generator().manual_seed(2)) * 250.0
    result, expected = in_chunks(model, inputs, 50_000), plain(model, inputs)
    assert (result - expected).norm() <= 1e-6 * expected.norm()


def test_a_time_step_of_many_tokens_is_embedded_once() -> None:
    model = TI2V.make()
    embedded: list[int] = []
    model.condition_embedder.time_proj.register_forward_hook(lambda _, __, made: embedded.append(made.numel()))
    in_chunks(model, TI2V.inputs(), EVERYTHING)
    assert embedded == [2 * 6 * model.patch_embedding.out_channels]


def test_refuses_attention_arguments_and_fused_projections() -> None:
    model = WAN_21.make()
    some = ChunkSettings(workspace_bytes=1)
    with pytest.raises(ValueError, match="attention_kwargs"), chunked_wan(model, some):
        model(**WAN_21.inputs(), attention_kwargs={"scale": 0.5})
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"), chunked_wan(model, some):
        pass
    model.unfuse_qkv_projections()
    with chunked_wan(model, some):
        pass


@pytest.mark.parametrize("subject", ["wan2.1-i2v", "wan2.2-ti2v"], indirect=True)
def test_beyond_the_first_blocks_take_no_more_memory(subject: Subject) -> None:
    peaks: list[int] = []
    inputs = subject.published_inputs(1, subject.size(832, 480, 81), torch.bfloat16)
    for blocks in (1, 3):
        config = {**subject.architecture().config(subject.component), "num_layers": blocks}
        with torch.device("meta"):
            model = nn.Module.to(subject.denoiser.cls().from_config(config), torch.bfloat16).eval()
        settings = ChunkSettings(workspace_bytes=256 * MIB)
        with StorageMeter() as meter, fused_attention(), chunked_wan(model, settings, runner=DistinctChunks()):
            model(**inputs)
        peaks.append(meter.peak_bytes)
    assert peaks[0] == peaks[1]
