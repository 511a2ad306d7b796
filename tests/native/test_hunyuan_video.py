"""Core's HunyuanVideo in chunks: its masks, patches of its blocks, ControlNet, and layers that make several tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from .conftest import TOLERANCE, Core, off_by

pytestmark = pytest.mark.host
TEXT, IMAGE, WIDTH = 20, 3 * 8 * 12, 64
"""Tokens of the small model's text and image, and their width."""


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of a small model without a sampler around them: core's own, and in chunks."""

    core: Core
    model: Any

    def of_core(self, **more: Any) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "timestep": torch.tensor([500.0]),
            "context": random(1, TEXT, 64, seed=1),
            "y": random(1, 768, seed=2),
            "guidance": torch.tensor([6.0]),
            "transformer_options": {},
        }
        return self.model(random(1, 16, 3, 16, 24, seed=3), **arguments | more)

    def in_chunks(self, **more: Any) -> torch.Tensor:
        patches = self.patches()
        for patch in patches:
            patch.module.forward = patch.replacement
        try:
            return self.of_core(**more)
        finally:
            for patch in patches:
                del patch.module.forward

    def patches(self) -> list[Any]:
        held = self.core.native("held_weights").HeldWeightsRunner(torch.device("cpu"), torch.float32)
        state = self.core.native("calls").CallState(workspace_bytes=1, runner=held)
        return list(self.core.native("hunyuan_video").MODEL.patches(self.model, state))

    def patch(self, path: str) -> Any:
        """The replacement of a part's forward."""
        return next(it.replacement for it in self.patches() if it.path == path)

    def assert_equal(self, **more: Any) -> None:
        """The arguments act on the result, and alike in chunks."""
        expected = self.of_core(**more)
        assert off_by(expected, self.of_core()) > 1e-3
        assert off_by(self.in_chunks(**more), expected) <= TOLERANCE


@pytest.fixture
def calls(core: Core, make_patcher: Callable[..., Any]) -> Calls:
    return Calls(core, make_patcher("hunyuan_video-t2v").model.diffusion_model.requires_grad_(False))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_padding_of_the_text_is_masked(calls: Calls) -> None:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, 12:] = 0
    calls.assert_equal(attention_mask=mask)


def test_a_reference_frame_before_the_video(calls: Calls) -> None:
    calls.assert_equal(ref_latent=random(1, 16, 1, 16, 24, seed=4))


def test_a_first_frame_that_is_known(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """The sampler holds it by a mask, which core's node puts out."""
    patcher = make_patcher("hunyuan_video-i2v-replace")
    mask = torch.ones(1, 1, 3, 16, 24)
    mask[:, :, 0] = 0
    expected = sample(patcher, noise_mask=mask)
    assert off_by(expected, sample(patcher)) > 1e-3
    assert off_by(sample(core.chunked(patcher, 1), noise_mask=mask), expected) <= TOLERANCE


def test_residuals_of_a_controlnet(calls: Calls) -> None:
    residual = random(1, IMAGE, WIDTH, seed=4)
    calls.assert_equal(control={"input": [residual], "output": [None, residual]})
    assert torch.equal(residual, random(1, IMAGE, WIDTH, seed=4)), "a residual has been changed"


@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_a_block_that_is_called_twice_by_another_node(calls: Calls, kind: str) -> None:
    """Core's block updates its input in place, so the second call goes on from there."""

    def twice(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        extra["original_block"](args)
        return extra["original_block"](args)

    calls.assert_equal(transformer_options={"patches_replace": {"dit": {(kind, 1): twice}}})


@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_a_mask_with_a_row_for_each_query(calls: Calls, kind: str) -> None:
    """Nodes for regional prompts make such a mask."""
    mask = 3 * random(1, TEXT + IMAGE, TEXT + IMAGE, seed=4)

    def masked(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        return extra["original_block"]({**args, "attention_mask": mask})

    calls.assert_equal(transformer_options={"patches_replace": {"dit": {(kind, 1): masked}}})


@pytest.mark.parametrize("name", ["attn1_patch", "attn1_output_patch"])
def test_patches_of_attention_see_all_tokens(calls: Calls, name: str) -> None:
    seen: list[torch.Size] = []

    def patch(first: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        seen.append(first.shape)
        return {"q": first * 1.5} if name == "attn1_patch" else first * 1.5

    calls.assert_equal(transformer_options={"patches": {name: [patch]}})
    half = len(seen) // 2
    assert seen[:half] == seen[half:]


def test_queries_stand_in_the_blocks_in_which_they_stand_in_core(calls: Calls) -> None:
    """SageAttention rounds 128 queries together: text, and image, beginning where the text ends."""

    def rounding(func: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        blocks = q.split(128, dim=2)
        scales = [block.abs().amax(dim=(2, 3), keepdim=True) / 7 for block in blocks]
        rounded = [(block / scale).round() * scale for block, scale in zip(blocks, scales, strict=True)]
        return func(torch.cat(rounded, 2), *args, **kwargs)

    calls.assert_equal(transformer_options={"optimized_attention_override": rounding})


def test_segments_that_begin_and_end_within_chunks(calls: Calls) -> None:
    """Runs of tokens with a modulation of their own; one is shorter than a chunk, another longer."""
    model, first = calls.model, 280
    segments = [(0, 100, 1), (100, 130, 0), (130, None, 1)]
    hidden, vec = random(1, 300, WIDTH, seed=4), random(1, 2, WIDTH, seed=5)
    pe = model.pe_embedder(random(1, 300, 3, seed=6))

    def results(single: Any, double: Any, last: Any) -> list[torch.Tensor]:
        img, txt = hidden[:, :first].clone(), hidden[:, first:].clone()
        options = {"modulation_dims_img": segments, "modulation_dims_txt": [(0, None, 1)]}
        return [
            single(hidden.clone(), vec, pe, modulation_dims=segments),
            *double(img, txt, vec, pe, **options),
            last(hidden, vec, modulation_dims=segments),
        ]

    expected = results(model.single_blocks[0], model.double_blocks[0], model.final_layer)
    made = results(calls.patch("single_blocks.0"), calls.patch("double_blocks.0"), calls.patch("final_layer"))
    for result, wanted in zip(made, expected, strict=True):
        assert off_by(result, wanted) <= TOLERANCE


def test_overflows_in_fp16_are_replaced_as_in_core(calls: Calls) -> None:
    block = calls.model.half().double_blocks[0]
    img, txt = (random(1, 150, WIDTH, seed=seed).half() * 60000 for seed in (4, 5))
    txt[:, 3] = torch.inf
    vec, pe = random(1, WIDTH, seed=6).half(), calls.model.pe_embedder(random(1, 300, 3, seed=7))
    hidden = torch.cat((txt, img), 1)
    expected = [block(img.clone(), txt.clone(), vec, pe)[1], calls.model.single_blocks[0](hidden.clone(), vec, pe)]
    made = [
        calls.patch("double_blocks.0")(img.clone(), txt.clone(), vec, pe)[1],
        calls.patch("single_blocks.0")(hidden.clone(), vec, pe),
    ]
    for result, wanted in zip(made, expected, strict=True):
        assert wanted.isfinite().all()
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn])
def test_weights_are_cast_as_often_as_in_core(
    core: Core, make_patcher: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    """However many chunks a layer runs in, and though a fused layer runs in two loops over them."""
    patcher = make_patcher("hunyuan_video-t2v", dtype=stored, compute_dtype=torch.float32)
    calls = Calls(core, patcher.model.diffusion_model.requires_grad_(False))
    casts: list[str] = []
    cast = core.ops.cast_bias_weight

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        # What is held lies there cast. The patch embedding is not held: it runs once a frame.
        if layer.weight.dtype is stored and not isinstance(layer, torch.nn.Conv3d):
            casts.append(type(layer).__name__)
        return cast(layer, *args, **kwargs)

    monkeypatch.setattr(core.ops, "cast_bias_weight", counted)
    expected, of_core = calls.of_core(), len(casts)
    assert off_by(calls.in_chunks(), expected) <= TOLERANCE
    assert len(casts) - of_core == of_core
    assert calls.model.single_blocks[0].linear1.weight.dtype is stored


def test_fused_layers_cost_no_more_than_in_core(calls: Calls) -> None:
    def flops(call: Callable[[], torch.Tensor]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name))

    assert flops(calls.in_chunks) == flops(calls.of_core)


@pytest.mark.parametrize("path", ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1"])
def test_a_fused_layer_that_another_node_runs(calls: Calls, path: str) -> None:
    layer, plain = calls.model.get_submodule(path), calls.of_core()
    own = layer.forward
    layer.forward = lambda x: own(x * 1.5)
    expected = calls.of_core()
    assert off_by(expected, plain) > 1e-3
    assert off_by(calls.in_chunks(), expected) <= TOLERANCE


def test_a_fused_layer_that_scales_its_input(calls: Calls) -> None:
    """Core's quantised layers do so where their file has a `pre_quant_scale`."""
    layer, plain = calls.model.single_blocks[0].linear1, calls.of_core()
    own = type(layer)
    layer.pre_quant_scale = torch.tensor(1.5)
    forward = {"forward": lambda self, x: own.forward(self, x * self.pre_quant_scale)}
    layer.__class__ = type("Linear", (own,), forward)
    expected = calls.of_core()
    assert off_by(expected, plain) > 1e-3
    assert off_by(calls.in_chunks(), expected) <= TOLERANCE


def test_only_core_s_own_blocks_are_patched(core: Core, calls: Calls) -> None:
    single_block = importlib.import_module("comfy.ldm.flux.layers").SingleStreamBlock
    calls.model.single_blocks[1].__class__ = type("Other", (single_block,), {})
    paths = {it.path for it in calls.patches()}
    assert paths >= {"single_blocks.0", "double_blocks.1", "final_layer", "img_in"}
    assert "single_blocks.1" not in paths
    flux = importlib.import_module("comfy.ldm.flux.model").Flux  # of the same blocks
    assert core.native("model").native_model(object.__new__(flux)) is None
