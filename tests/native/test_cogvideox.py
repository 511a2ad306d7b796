"""Core's CogVideoX in chunks: core's own result, with whatever other nodes do to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import TOLERANCE, Core, off_by

pytestmark = pytest.mark.host


def test_positions_that_are_not_stored(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """Computed for all patches together, so the embedding runs as it is."""
    patcher = make_patcher("cogvideox-i2v")
    stored = sample(patcher)
    patcher.model.diffusion_model.patch_embed.use_learned_positional_embeddings = False
    patcher.model.diffusion_model.patch_embed.spatial_interpolation_scale = 1.0
    expected = sample(patcher)
    assert off_by(expected, stored) > 1e-3
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_rotation_beside_stored_positions(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    patcher = make_patcher("cogvideox-i2v")
    patcher.model.diffusion_model.use_rotary_positional_embeddings = True
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_queries_are_cut_where_attention_kernels_quantise_them(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """SageAttention quantises 128 tokens of the sequence together, which begins with the text."""
    lengths: list[tuple[int, int]] = []

    def attend(func: Any, q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append((q.shape[1], k.shape[1]))
        return func(q, k, *args, **kwargs)

    clone = core.chunked(make_patcher("cogvideox-t2v"), 1)
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = attend
    sample(clone)
    assert lengths[:4] == [(128, 388), (128, 388), (128, 388), (4, 388)]


def test_a_block_of_another_node_that_returns_a_kept_result(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """Caching nodes skip blocks whose result changes little; what they keep is not overwritten."""

    def keeping(block: Any) -> Callable[..., Any]:
        kept: list[Any] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not kept:
                kept.append(type(block).forward(block, *args, **kwargs))
            return kept[0]

        return forward

    patcher = make_patcher("cogvideox-t2v")
    blocks = patcher.model.diffusion_model.blocks
    patcher.add_object_patch("diffusion_model.blocks.1.forward", keeping(blocks[1]))
    expected = sample(patcher, steps=2)
    patcher.add_object_patch("diffusion_model.blocks.1.forward", keeping(blocks[1]))
    clone = core.chunked(patcher, 1)
    assert clone.get_attachment(core.native("fit").KEY).left_out == ["blocks.1"]
    assert off_by(sample(clone, steps=2), expected) <= TOLERANCE


def test_another_node_that_runs_the_blocks_itself(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """It may hold what it gives to a block, to see how much that has changed it."""
    patcher = make_patcher("cogvideox-t2v")
    model = patcher.model.diffusion_model

    def forward(x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        embedded = model.patch_embed(context, x.transpose(1, 2))
        text, image = embedded.tensor_split([context.shape[1]], dim=1)
        changed, _ = model.blocks[0](image, text, torch.ones(len(x), 32))
        return x * (changed - image).square().mean()

    patcher.add_object_patch("diffusion_model._forward", forward)
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_a_norm_that_another_node_has_replaced(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """It may look at a token's place, so its block runs as it is."""
    patcher = make_patcher("cogvideox-t2v")
    norm = patcher.model.diffusion_model.blocks[1].norm1

    def forward(image: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
        normed, *others = type(norm).forward(norm, image, *args)
        return normed * torch.linspace(0, 1, image.shape[1]).view(1, -1, 1), *others

    patcher.add_object_patch("diffusion_model.blocks.1.norm1.forward", forward)
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_weights_are_cast_no_more_often_than_in_core(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    casts_of: Callable[[torch.dtype], list[str]],
) -> None:
    """However many chunks a layer runs in; core casts a block's norms once for the text and once for the image."""
    patcher = make_patcher("cogvideox-v1.5-i2v", dtype=torch.float16, compute_dtype=torch.float32)
    casts = casts_of(torch.float16)
    expected, of_core = sample(patcher, cfg=1.0), len(casts)
    result = sample(core.chunked(patcher, 1), cfg=1.0)
    assert off_by(result, expected) <= TOLERANCE
    assert 0 < len(casts) - of_core <= of_core
