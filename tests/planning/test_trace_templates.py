"""One template for all workspaces, and few traces for a plan."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from i2v_core.chunking import ChunkSettings, LayerCall, ShapeOnlyRunner
from i2v_core.decoding import ONE_FRAME_UNTILED, TilingSettings
from i2v_core.families import FAMILIES, Placed, VideoSize, Workload, bundled_architecture, bundled_models, family_of
from i2v_core.memory.device import DeviceFacts
from i2v_core.memory.meter import StorageMeter
from i2v_core.planning.planner import find_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.search import lowest_memory_stages
from i2v_core.planning.trace import META, autoencoder_template, denoiser_template, interruptible, skeleton, tracing
from i2v_core.units import GIB, MIB
from tests.marking import first_quick

CARD = DeviceFacts(device="cuda", name="a card", precisions=(torch.bfloat16,))
MODELS = bundled_models()


class Noted(ShapeOnlyRunner):
    """The live tensors at the peak of every layer call, and its chunking."""

    def __init__(self, meter: StorageMeter) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self._meter = meter

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        before_bytes = self._meter.current_bytes
        yield
        around_bytes = before_bytes if call.workspace_holds_result else self._meter.current_bytes
        self.calls.append((call.chunk_size, before_bytes, around_bytes + call.workspace_bytes))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("offload_skips", [False, True])
@pytest.mark.parametrize(("width", "height", "frames", "branches"), first_quick([(512, 512, 17, 2), (992, 544, 5, 1)]))
def test_one_template_does_for_all_workspaces(
    model: str, width: int, height: int, frames: int, branches: int, offload_skips: bool
) -> None:
    architecture, size = bundled_architecture(model), VideoSize(width_pixels=width, height_pixels=height, frames=frames)
    family = family_of(architecture)
    component = family.denoisers(architecture)[0].component
    module = skeleton(architecture, component, torch.float16)
    workload = family.denoise_workload(architecture, size, branches)
    template = denoiser_template(architecture, size, branches, torch.float16, component, offload_skips=offload_skips)
    for workspace_bytes in (1, 3 * MIB, 64 * MIB, 256 * MIB, GIB, 2**62):
        with tracing() as meter:
            noted = Noted(meter)
            settings = ChunkSettings(workspace_bytes=workspace_bytes, offload_skips=offload_skips)
            with family.chunked(module, settings, runner=noted, on_chunk=lambda: None):
                workload.run(Placed(module=module, device=META, dtype=torch.float16, runner=noted))
        calls = template.for_workspace(workspace_bytes).calls
        assert [(it.chunk_size, it.before_bytes, it.activation_bytes) for it in calls] == noted.calls
        assert template.offloaded_bytes == meter.host_peak_bytes


def of_autoencoder(model: str, size: VideoSize, pieces: TilingSettings) -> list[Workload]:
    architecture = bundled_architecture(model)
    family = family_of(architecture)
    return [
        *(it for it in family.encode_workloads(architecture, size, True, pieces) if it.by_layer),
        family.decode_workload(size, pieces),
    ]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("maps_bytes", [None, 16 * MIB, 0])
def test_one_template_does_for_all_tiles(model: str, maps_bytes: int | None) -> None:
    size = VideoSize(width_pixels=416, height_pixels=224, frames=5)
    frames = family_of(bundled_architecture(model)).decode_chunk_sizes(size, max_useful=1)[-1]
    smallest = TilingSettings(chunk_size=frames, tile_pixels=1, maps_bytes=maps_bytes)
    module = skeleton(bundled_architecture(model), "vae", torch.bfloat16)
    templates = [autoencoder_template(module, it, torch.bfloat16) for it in of_autoencoder(model, size, smallest)]
    for tile_pixels in (32, 200, 2048):
        pieces = replace(smallest, tile_pixels=tile_pixels)
        for template, workload in zip(templates, of_autoencoder(model, size, pieces), strict=True):
            assert template.for_workspace(tile_pixels**2) == autoencoder_template(
                module, workload, torch.bfloat16
            ).for_workspace(1)


@pytest.mark.parametrize("model", MODELS)
def test_only_a_denoiser_with_skips_is_said_to_have_them(model: str) -> None:
    architecture = bundled_architecture(model)
    family = family_of(architecture)
    component, size = (
        family.denoisers(architecture)[0].component,
        VideoSize(width_pixels=64, height_pixels=64, frames=5),
    )
    template = denoiser_template(architecture, size, 1, torch.float16, component, offload_skips=True)
    assert (template.offloaded_bytes > 0) == family.facts.has_skips


def test_every_family_is_among_the_bundled_models() -> None:
    assert {bundled_architecture(model).family for model in MODELS} == set(FAMILIES)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("budget_bytes", "most_traces"), first_quick([(7 * GIB, 10), (80 * GIB, 7), (GIB // 8, 6)]))
def test_a_size_that_was_never_asked_before_takes_few_traces(model: str, budget_bytes: int, most_traces: int) -> None:
    """The page waits for this at each change of a widget: a trace takes some hundredths of a second."""
    architecture, traces = bundled_architecture(model), 0

    def plan(width: int) -> None:
        size = VideoSize(width_pixels=width, height_pixels=448, frames=25)
        request = Request(architecture=architecture, size=size)
        if find_plan(request, Budget(free_bytes=budget_bytes), CARD) is None:
            lowest_memory_stages(request, CARD)

    def count() -> None:
        nonlocal traces
        traces += 1

    plan(768)  # what does not depend on the size
    with interruptible(count):
        plan(832)
    assert traces <= most_traces


def test_the_picture_is_encoded_whole_where_that_fits() -> None:
    """Though large tiles, whose layers' maps are whole, would take more."""
    size = VideoSize(width_pixels=480, height_pixels=832, frames=5)
    request = Request(architecture=bundled_architecture("wan2.1-i2v-14b"), size=size, precision="fp32")
    plan = find_plan(request, Budget(free_bytes=5 * GIB), DeviceFacts(device="cpu", name="cpu", precisions=()))
    assert plan is not None
    assert plan.encode.settings.tiling == ONE_FRAME_UNTILED
