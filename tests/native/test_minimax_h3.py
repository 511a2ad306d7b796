"""Core's MiniMax H3 in chunks: the form of its files, its precisions, and what other nodes do to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import CASE, SMALL_MODELS, TOLERANCE, Core, called_twice, off_by

pytestmark = pytest.mark.host
CPU = torch.device("cpu")


def test_int8_weights(core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]) -> None:
    """The file that core's template loads has them, rotated: they are multiplied as they are stored, for some heads."""
    import comfy.sd  # pyright: ignore[reportMissingImports]
    from comfy.quant_ops import QuantizedTensor  # pyright: ignore[reportMissingImports]

    name = "minimax_h3-keyframes"
    plain = make_patcher(name).model
    state = dict(plain.diffusion_model.state_dict())
    rotation = {"convrot": True, "convrot_groupsize": 16}
    described = json.dumps({"format": "int8_tensorwise", **rotation}).encode()
    for path in [it for it in state if it.endswith(("_proj.weight", "fc1.weight", "fc2.weight")) and "blocks." in it]:
        weight = QuantizedTensor.from_float(state[path], "TensorWiseINT8Layout", per_channel=True, **rotation)
        state |= weight.state_dict(path)
        state[path.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(described), dtype=torch.uint8)
    patcher = comfy.sd.load_diffusion_model_state_dict(state, {"dtype": torch.float32})
    patcher.set_attachments(CASE, SMALL_MODELS[name])
    quantised = [it for it in patcher.model.diffusion_model.parameters() if isinstance(it, QuantizedTensor)]
    assert any(it is patcher.model.diffusion_model.blocks[0].attn.qkv_proj.weight for it in quantised)
    assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), sample(patcher, cfg=1.0)) <= TOLERANCE
    native = core.native("model").native_model(plain.diffusion_model)
    in_fp32, in_int8 = (
        core.native("call_planner").CallPlanner(native, base, torch.device("cpu")).weights_bytes
        for base in (plain, patcher.model)
    )
    saved_bytes = sum(3 * it.numel() for it in quantised)
    assert 0.95 * saved_bytes < in_fp32 - in_int8 <= saved_bytes  # beside scales


def test_what_core_computes_in_fp32_stays_so(core: Core, make_patcher: Callable[..., Any]) -> None:
    """The first and last layers, in a model whose blocks compute in bf16."""
    model = make_patcher("minimax_h3-t2v", compute_dtype=torch.bfloat16).model.diffusion_model
    ends, calls = core.native("minimax_h3.ends"), core.native("calls")
    runner = core.native("held_weights").HeldWeightsRunner(CPU, torch.bfloat16)
    state = calls.CallState(workspace_bytes=1, dtype=torch.bfloat16, runner=runner)
    x, t_emb, rows = torch.randn(300, 64).bfloat16(), torch.randn(2, 40).bfloat16(), torch.randn(300, 96)
    segments = ((100, 300, 1), (20, 100, 0))
    with torch.no_grad():
        expected = model.final_layer(x, t_emb, *segments)
        result = ends.FinalLayer(model.final_layer, state)(x, t_emb, *segments)
        for made, wanted in zip(result, expected, strict=True):
            assert made.dtype is torch.float32
            assert off_by(made, wanted) <= TOLERANCE
        wanted = model.video_patch_proj(rows).bfloat16()
        model.video_patch_proj.forward = ends.PatchEmbedding(model.video_patch_proj, state)
        assert torch.equal(model.video_patch_proj(rows).to(torch.bfloat16)[50:300], wanted[50:])


@pytest.mark.parametrize("name", ["minimax_h3-t2v", "minimax_h3-keyframes", "minimax_h3-references"])
def test_the_call_is_foreseen(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    """Planned before weights are loaded, and without running a part of the model."""
    patcher = make_patcher(name)
    model, fit = patcher.model.diffusion_model, core.native("fit")
    refined: list[int] = []
    model.token_refiner.register_forward_pre_hook(lambda *_: refined.append(1))
    asked: list[int] = []
    services = fit.Services(usable_bytes=lambda: asked.append(1) or 2**40, check_cancelled=lambda: None)
    expected, of_core = sample(patcher, steps=2, cfg=1.0), len(refined)
    clone, _ = fit.fitted(patcher, services)
    assert torch.equal(sample(clone, steps=2, cfg=1.0), expected)
    assert len(refined) == 2 * of_core
    assert len(asked) == 1
    plans = clone.get_attachment(fit.KEY)._plans
    assert len(plans) == 2, "the shapes of both prompts are foreseen, and there are no others"


@pytest.mark.parametrize(("quant_format", "group"), [(None, 4), ("one_that_cannot_be_sliced", 8)])
def test_attention_sees_every_head_once_and_all_tokens(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    quant_format: str | None,
    group: int,
) -> None:
    """For kernels that treat tokens by their place, or quantise them together."""
    seen: list[tuple[int, torch.Size, torch.Size]] = []

    def attention(func: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **options: Any) -> Any:
        seen.append((heads, q.shape, k.shape))
        return func(q, k, v, heads, **options)

    patcher = make_patcher("minimax_h3-t2v")
    for block in patcher.model.diffusion_model.blocks:
        block.attn.qkv_proj.quant_format = quant_format
    patcher.model_options["transformer_options"]["optimized_attention_override"] = attention
    expected = sample(patcher, cfg=1.0)
    of_core = [it for it in seen if it[1][2] > 100]  # the others are of the text alone
    seen.clear()
    assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), expected) <= TOLERANCE
    in_groups = [it for it in seen if it[1][2] > 100]
    assert len(in_groups) == 8 // group * len(of_core)
    tokens = of_core[0][1][2]
    assert all(it == (group, (1, group, tokens, 32), (1, group, tokens, 32)) for it in in_groups)


@pytest.mark.parametrize("layer", ["attn", "mlp"])
def test_a_layer_that_another_node_has_replaced(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], layer: str
) -> None:
    patcher = make_patcher("minimax_h3-t2v")
    for index, block in enumerate(patcher.model.diffusion_model.blocks):
        own = getattr(block, layer)

        def forward(x: torch.Tensor, own: Any = own, **options: Any) -> torch.Tensor:
            # Looks at a token's place, as regional prompts do.
            return type(own).forward(own, x, **options) * torch.linspace(0, 1, len(x)).view(-1, 1)

        patcher.add_object_patch(f"diffusion_model.blocks.{index}.{layer}.forward", forward)
    expected = sample(patcher, cfg=1.0)
    assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), expected) <= TOLERANCE


def test_an_embedding_that_another_node_wraps(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """A LoRA beside the layer does so when the model is loaded: it gets a tensor to work with."""
    patcher = make_patcher("minimax_h3-keyframes")
    layer = patcher.model.diffusion_model.video_patch_proj

    def wrapped(executor: Any, *args: Any, **kwargs: Any) -> Any:
        own = layer.forward
        layer.forward = lambda rows: own(rows) + 0.1 * rows.mean(dim=1, keepdim=True)
        try:
            return executor(*args, **kwargs)
        finally:
            layer.forward = own

    expected_without = sample(patcher, cfg=1.0)
    patcher.add_wrapper_with_key(core.extension.WrappersMP.DIFFUSION_MODEL, "wrapped", wrapped)
    expected = sample(patcher, cfg=1.0)
    assert off_by(expected, expected_without) > 1e-4
    assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), expected) <= TOLERANCE


def test_a_block_that_is_called_twice_by_another_node(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """Core's block updates its input, which this node sees."""

    patcher = make_patcher("minimax_h3-t2v")
    patcher.set_model_patch_replace(called_twice, "dit", "double_block", 1)
    expected = sample(patcher, cfg=1.0)
    assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), expected) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_weights_are_cast_as_often_as_in_core(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    casts_of: Callable[[torch.dtype], list[str]],
) -> None:
    """However many groups of heads and chunks of tokens a layer runs in."""
    patcher = make_patcher("minimax_h3-t2v", dtype=torch.float16, compute_dtype=torch.float32)
    casts = casts_of(torch.float16)
    expected, of_core = sample(patcher, cfg=1.0), len(casts)
    assert off_by(sample(core.chunked(patcher, 1), cfg=1.0), expected) <= TOLERANCE
    assert len(casts) - of_core == of_core


def test_a_lora_is_applied(core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]) -> None:
    patcher = make_patcher("minimax_h3-t2v")
    patched = patcher.clone()
    for layer in ("blocks.0.attn.qkv_proj", "video_patch_proj"):
        weight = patcher.model.diffusion_model.get_submodule(layer).weight
        patched.add_patches({f"diffusion_model.{layer}.weight": (torch.full_like(weight, 0.5),)}, 1.0)
    expected = sample(patched, cfg=1.0)
    assert off_by(expected, sample(patcher, cfg=1.0)) > 1e-3
    assert off_by(sample(core.chunked(patched, 1), cfg=1.0), expected) <= TOLERANCE
