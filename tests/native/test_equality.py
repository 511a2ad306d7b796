"""Every native model in chunks: core's own result, and the memory that its twin predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import SMALL_MODELS, TOLERANCE, Core, off_by, predicted_and_measured

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
    peaks = predicted_and_measured(core, make_patcher(name), sample, workspace_bytes)
    assert peaks
    for predicted, measured in peaks:
        assert measured <= predicted <= 1.05 * measured
