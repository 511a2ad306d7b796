"""The outline of a forward against a full trace of it."""

from __future__ import annotations

import sys

import pytest
import torch

from i2v_core.chunking import ChunkSettings, DistinctChunks, LayerRunner
from i2v_core.families import Placed, bundled_architecture
from i2v_core.placement.storage import WeightStorage
from i2v_core.planning.trace import META, skeleton, trace_denoiser, tracing, weights_bytes
from i2v_core.planning.weights import module_weights
from i2v_core.units import GIB, MIB
from tests.subjects import Subject


@pytest.mark.parametrize("workspace_bytes", [sys.maxsize, 256 * MIB, 64 * MIB])
@pytest.mark.parametrize(("width", "height", "frames", "branches"), [(512, 512, 16, 2), (1000, 520, 5, 1)])
def test_an_outline_finds_the_peak_of_a_full_trace(
    subject: Subject, width: int, height: int, frames: int, branches: int, workspace_bytes: int
) -> None:
    """The published model's architecture in fp16: never under by more than 0.1 %, never over by more than 1 %."""
    architecture, family = subject.architecture(all_layers=False), subject.family
    size = subject.size(width, height, frames)
    for offload_skips in subject.denoiser.offload_choices:
        settings = ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=offload_skips)
        calls = trace_denoiser(architecture, size, branches, torch.float16, settings).calls
        outlined = max(call.activation_bytes for call in calls)
        module = skeleton(architecture, subject.component, torch.float16)
        with tracing() as meter, family.chunked(module, settings, runner=DistinctChunks(), on_chunk=lambda: None):
            family.denoise_workload(architecture, size, branches).run(
                Placed(module=module, device=META, dtype=torch.float16, runner=LayerRunner())
            )
        assert 0.999 <= outlined / meter.peak_bytes <= 1.01


@pytest.mark.parametrize(
    ("model", "sizes_gib"),
    [
        ("i2vgen-xl", {"unet": 2.646, "vae": 0.156, "text_encoder": 0.657, "image_encoder": 1.177}),
        ("svd", {"unet": 2.840, "vae": 0.182, "image_encoder": 1.177}),
    ],
)
def test_the_published_models_weights(model: str, sizes_gib: dict[str, float]) -> None:
    """Parameters as published, in fp16."""
    for component, expected_gib in sizes_gib.items():
        taken_bytes = weights_bytes(bundled_architecture(model), component, torch.float16)
        assert taken_bytes / GIB == pytest.approx(expected_gib, abs=1e-3)


def test_every_weight_of_the_denoiser_belongs_to_one_call(subject: Subject) -> None:
    architecture, size = subject.architecture(all_layers=False), subject.size(256, 256, 2)
    trace = trace_denoiser(architecture, size, 1, torch.float16, ChunkSettings(workspace_bytes=MIB))
    modules = tuple(call.modules for call in trace.calls)
    weights = module_weights(trace.module, WeightStorage.AS_COMPUTED, modules)
    assert weights.stored_bytes == weights_bytes(architecture, subject.component, torch.float16)
    assert sum(call.stored_bytes for call in weights.calls) == weights.stored_bytes
