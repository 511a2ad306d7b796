"""Core's Kandinsky 5 in chunks: core's own result, with whatever other nodes do to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import TOLERANCE, Core, by_place, off_by

pytestmark = pytest.mark.host


@pytest.mark.parametrize("name", ["self_attention", "cross_attention", "feed_forward"])
def test_a_layer_that_another_node_has_replaced(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    patcher = make_patcher("kandinsky5-lite-t2v")
    for index, block in enumerate(patcher.model.diffusion_model.visual_transformer_blocks):
        patcher.add_object_patch(
            f"diffusion_model.visual_transformer_blocks.{index}.{name}.forward", by_place(getattr(block, name))
        )
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_a_block_of_another_node_that_returns_a_kept_result(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """Caching nodes skip blocks whose result changes little; what they keep is not overwritten."""

    def with_replaced(patcher: Any) -> Any:
        kept: list[torch.Tensor] = []

        def replaced(args: dict[str, Any], _extra: dict[str, Any]) -> dict[str, Any]:
            if not kept:
                kept.append(args["x"] * 1.1)
            return {"x": kept[0]}

        clone = patcher.clone()
        clone.set_model_patch_replace(replaced, "dit", "double_block", 1)
        return clone

    patcher = make_patcher("kandinsky5-lite-t2v")
    expected = sample(with_replaced(patcher), steps=2)
    assert off_by(sample(core.chunked(with_replaced(patcher), 1), steps=2), expected) <= TOLERANCE


def test_weights_are_cast_as_often_as_in_core(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    casts_of: Callable[[torch.dtype], list[str]],
) -> None:
    """However many chunks a layer runs in."""
    patcher = make_patcher("kandinsky5-pro-i2v", dtype=torch.float16, compute_dtype=torch.float32)
    casts = casts_of(torch.float16)
    expected, of_core = sample(patcher, cfg=1.0), len(casts)
    result = sample(core.chunked(patcher, 1), cfg=1.0)
    assert off_by(result, expected) <= TOLERANCE
    assert len(casts) - of_core == of_core
