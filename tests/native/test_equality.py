"""Every native model in chunks: core's own result, and the memory that its twin predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import SMALL_MODELS, TOLERANCE, Core, off_by

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("one_thread")]
WORKSPACES = [1, 300_000]


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_it_gives_what_core_gives(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    patcher = make_patcher(name)
    expected = sample(patcher)
    for workspace_bytes in WORKSPACES:
        result = sample(core.chunked(patcher, workspace_bytes))
        assert off_by(result, expected) <= TOLERANCE, f"in chunks of {workspace_bytes} bytes"
    assert torch.equal(sample(core.chunked(patcher, None)), expected), "unchunked"
    assert torch.equal(sample(patcher), expected), "core's own run is not what it was"


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("workspace_bytes", [None, 1, 300_000])
def test_two_blocks_predict_the_peak_of_all(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    name: str,
    workspace_bytes: int | None,
) -> None:
    """Held against the metered calls of a sampler's run of the whole model."""
    memory, twin = core.native("kernel_memory"), core.native("twin")
    patcher = make_patcher(name)
    model = patcher.model.diffusion_model
    peaks: list[tuple[int, int]] = []

    def metered(executor: Any, *args: Any, **kwargs: Any) -> Any:
        executor(*args, **kwargs)  # core keeps some tables from its first call on
        shapes = twin.Twin(core.native("model").native_model(model), model, torch.float32)
        predicted = shapes.peak_bytes(twin.Call(model, args, kwargs), workspace_bytes)
        with memory.kernel_meter(torch.device("cpu"), "cpu") as measured:
            result = executor(*args, **kwargs)
        peaks.append((measured.peak_bytes, predicted))
        return result

    clone = core.chunked(patcher, workspace_bytes)
    clone.add_wrapper_with_key(core.extension.WrappersMP.DIFFUSION_MODEL, "metered", metered)
    options = clone.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = core.native("attention_memory").attention_output
    sample(clone, cfg=1.0)
    assert peaks
    for measured, predicted in peaks:
        assert measured <= predicted <= 1.05 * measured
