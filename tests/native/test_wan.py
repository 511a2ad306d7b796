"""Core's Wan in chunks: core's own result, in less memory, with whatever other nodes do to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import TOLERANCE, Core, off_by

pytestmark = pytest.mark.host


def test_a_time_step_for_each_frame(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """TI2V gives known frames the time step 0: the modulation has a row for each latent frame."""
    patcher = make_patcher("wan-ti2v")
    steps = torch.tensor([[0.0, 700.0, 700.0]])
    patcher.add_object_patch("process_timestep", lambda timestep, **_: steps.expand(len(timestep), -1))
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


@pytest.mark.parametrize("name", ["attn1_patch", "attn2_patch", "double_block"])
def test_patches_of_other_nodes_act_as_in_core(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    seen: list[torch.Size] = []

    def patch(given: dict[str, Any]) -> Any:
        hidden = given["img"] if name == "double_block" else given["x"]
        seen.append(hidden.shape)
        changed = hidden * 1.01
        return {"img": changed} if name == "double_block" else changed

    patcher = make_patcher("wan-t2v")
    patcher.set_model_patch(patch, name)
    expected, calls = sample(patcher), len(seen)
    if not calls:
        pytest.skip(f"this ComfyUI calls no {name}")
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE
    assert seen[:calls] == seen[calls:], "the patch has seen other shapes, or was called another number of times"


def test_a_block_that_is_called_twice_by_another_node(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """A wrapper around a block may hold its input, so that is not overwritten."""

    def twice(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        extra["original_block"](args)
        return extra["original_block"](args)

    patcher = make_patcher("wan-t2v")
    patcher.set_model_patch_replace(twice, "dit", "double_block", 1)
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_attention_that_another_node_has_replaced(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    patcher = make_patcher("wan-t2v")
    for index, block in enumerate(patcher.model.diffusion_model.blocks):
        own = block.cross_attn

        def forward(x: torch.Tensor, context: torch.Tensor, own: Any = own, **options: Any) -> torch.Tensor:
            # Looks at a token's place, as regional prompts do.
            weights = torch.linspace(0, 1, x.shape[1]).view(1, -1, 1)
            return type(own).forward(own, x, context, **options) * weights

        patcher.add_object_patch(f"diffusion_model.blocks.{index}.cross_attn.forward", forward)
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_a_clone_that_moves_to_another_model_gets_its_own_patches(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    first, second = make_patcher("wan-t2v"), make_patcher("wan-t2v")
    with torch.no_grad():
        for parameter in second.model.parameters():
            parameter.mul_(1.1)
    expected = sample(second)
    moved = core.chunked(first, 1).clone(model_override=second.get_clone_model_override())
    assert off_by(sample(moved), expected) <= TOLERANCE


def test_two_fits_in_a_row_are_one(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    fit = core.native("fit")
    patcher = make_patcher("wan-i2v")
    expected = sample(patcher)
    once = core.chunked(patcher, 1)
    sample(once)  # its patches are in the model still
    twice = core.chunked(once, 1)
    assert twice.get_attachment(fit.KEY).left_out == []
    assert len(twice.get_wrappers("outer_sample", fit.KEY)) == 1
    assert off_by(sample(twice), expected) <= TOLERANCE


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
def test_weights_are_cast_as_often_as_in_core(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    stored: torch.dtype,
) -> None:
    """However many chunks a layer runs in."""
    patcher = make_patcher("wan-t2v", dtype=stored, compute_dtype=torch.float32)
    casts: list[str] = []
    cast = core.ops.cast_bias_weight

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if layer.weight.dtype is stored:  # what is held lies there cast
            casts.append(type(layer).__name__)
        return cast(layer, *args, **kwargs)

    monkeypatch.setattr(core.ops, "cast_bias_weight", counted)
    expected, of_core = sample(patcher, cfg=1.0), len(casts)
    result = sample(core.chunked(patcher, 1), cfg=1.0)
    assert off_by(result, expected) <= TOLERANCE
    assert len(casts) - of_core == of_core
    assert all(it.weight.dtype is stored for it in patcher.model.diffusion_model.blocks[0].ffn if hasattr(it, "weight"))


def test_a_lora_is_applied(core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]) -> None:
    patcher = make_patcher("wan-t2v")
    weight = patcher.model.diffusion_model.blocks[0].ffn[0].weight
    patched = patcher.clone()
    patched.add_patches({"diffusion_model.blocks.0.ffn.0.weight": (torch.full_like(weight, 0.5),)}, 1.0)
    expected = sample(patched)
    assert off_by(expected, sample(patcher)) > 1e-3
    assert off_by(sample(core.chunked(patched, 1)), expected) <= TOLERANCE
