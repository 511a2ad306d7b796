"""VRAM Fit with what other nodes do to a model's attention and to its prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ..conftest import CASE, TOLERANCE, off_by
from .conftest import LATENT_SHAPE, Fits, Sample

pytestmark = pytest.mark.host

BLOCK = 128
"""Queries that SageAttention quantises together."""


def with_attention(model: Any, kernel: Callable[..., torch.Tensor]) -> Any:
    """A clone with another attention function, as the nodes of SageAttention set it."""
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = kernel
    return clone


class BlockQuantised:
    """An attention function that rounds queries by the largest number of each block of them, and keeps the calls."""

    def __init__(self) -> None:
        self.query_lengths: list[int] = []
        self.keys: list[torch.Tensor] = []

    def __call__(self, _func: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **_: Any) -> Any:
        self.query_lengths.append(q.shape[1])
        self.keys.append(k)
        rounded = torch.cat([self._rounded(block) for block in q.split(BLOCK, dim=1)], dim=1)
        rounded, k, v = (it.unflatten(2, (heads, -1)).transpose(1, 2) for it in (rounded, k, v))
        return F.scaled_dot_product_attention(rounded, k, v).transpose(1, 2).flatten(2)

    @staticmethod
    def _rounded(block: torch.Tensor) -> torch.Tensor:
        scale = block.abs().amax() / 127
        return (block / scale).round() * scale


def test_sage_attention_gets_whole_blocks_of_queries(wan: Any, chunked: Fits, sample: Sample) -> None:
    """Or it would quantise them by other numbers than core's call."""
    shape = (1, 16, 3, 16, 24)
    stock, chunks = BlockQuantised(), BlockQuantised()
    expected = sample(with_attention(wan, stock), latent_shape=shape)
    result = sample(with_attention(chunked(wan), chunks), latent_shape=shape)
    assert set(stock.query_lengths) == {288}
    assert set(chunks.query_lengths) == {128, 32}
    assert off_by(result, expected) <= TOLERANCE
    assert len({id(it) for it in chunks.keys}) == len(stock.keys), "keys are made once for all chunks of queries"


@pytest.mark.parametrize("name", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"])
def test_attention_functions_of_core(assert_composes: Any, name: str) -> None:
    from comfy.ldm.modules import attention  # pyright: ignore[reportMissingImports]

    function = getattr(attention, name)
    assert_composes(lambda model: with_attention(model, lambda _, *args, **kwargs: function(*args, **kwargs)))


LAYERS = {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0}
GUIDANCE = {
    "SkipLayerGuidanceDiT": ("comfy_extras.nodes_slg", {**LAYERS, "scale": 3.0}),
    "SkipLayerGuidanceDiTSimple": ("comfy_extras.nodes_slg", LAYERS),
    "NAGuidance": ("comfy_extras.nodes_nag", {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 2.5}),
    "PerturbedAttentionGuidance": ("comfy_extras.nodes_pag", {"scale": 3.0}),
}
"""Nodes that guide by another attention, with their inputs."""


@pytest.mark.parametrize("name", GUIDANCE)
def test_guidance_by_attention(assert_composes: Any, run_node: Any, name: str) -> None:
    module, inputs = GUIDANCE[name]
    assert_composes(lambda model: run_node(module, name, model=model, **inputs))


def test_attention_that_was_replaced_and_given_back_is_chunked_again(wan: Any, chunked: Fits, sample: Sample) -> None:
    """Core leaves the class's own method in the instance then."""
    layer = wan.model.diffusion_model.blocks[0].self_attn
    replaced = wan.clone()
    forward = type(layer).forward
    replaced.add_object_patch(
        "diffusion_model.blocks.0.self_attn.forward", lambda *args, **kwargs: forward(layer, *args, **kwargs)
    )
    sample(replaced, latent_shape=LATENT_SHAPE)
    kernel = BlockQuantised()
    sample(with_attention(chunked(wan), kernel), latent_shape=LATENT_SHAPE)
    assert "forward" in vars(layer)
    assert max(kernel.query_lengths) == BLOCK


@pytest.fixture(scope="module")
def prompts(wan: Any) -> Callable[[int], list[Any]]:
    """A prompt by its seed."""
    case = wan.get_attachment(CASE)
    return lambda seed: [case.conditioning(torch.Generator().manual_seed(seed), LATENT_SHAPE)]


@pytest.fixture
def sample_prompts(run_node: Any) -> Callable[..., torch.Tensor]:
    """Samples with two prompts, through core's KSampler."""

    def sample(model: Any, positive: Any, negative: Any, steps: int = 2) -> torch.Tensor:
        return run_node(
            "nodes",
            "KSampler",
            model=model,
            seed=3,
            steps=steps,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            positive=positive,
            negative=negative,
            latent_image={"samples": torch.zeros(LATENT_SHAPE)},
        )["samples"]

    return sample


REGIONS = {
    "ConditioningSetMask": {"mask": torch.eye(8, 24)[None].cumsum(2), "strength": 0.8, "set_cond_area": "default"},
    "ConditioningSetArea": {"width": 96, "height": 64, "x": 96, "y": 0, "strength": 0.9},
    "ConditioningSetTimestepRange": {"start": 0.5, "end": 1.0},
}


@pytest.mark.parametrize("name", REGIONS)
def test_prompts_of_a_region_or_a_part_of_the_steps(
    wan: Any, chunked: Fits, run_node: Any, prompts: Any, sample_prompts: Any, name: str
) -> None:
    region = run_node("nodes", name, conditioning=prompts(4), **REGIONS[name])
    positive = run_node("nodes", "ConditioningCombine", conditioning_1=region, conditioning_2=prompts(5))
    expected = sample_prompts(wan, positive, prompts(6))
    assert off_by(sample_prompts(wan, prompts(5), prompts(6)), expected) > 1e-3
    assert off_by(sample_prompts(chunked(wan), positive, prompts(6)), expected) <= TOLERANCE


def test_a_lora_of_one_prompt(
    wan: Any, chunked: Fits, run_node: Any, prompts: Any, sample_prompts: Any, lora_file: str
) -> None:
    """Core changes the weights between the calls of a step."""
    hooks = run_node("comfy_extras.nodes_hooks", "CreateHookLoraModelOnly", lora_name=lora_file, strength_model=0.8)
    positive = run_node(
        "comfy_extras.nodes_hooks",
        "ConditioningSetProperties",
        cond_NEW=prompts(4),
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    expected = sample_prompts(wan, positive, prompts(6))
    assert off_by(sample_prompts(wan, prompts(4), prompts(6)), expected) > 1e-3
    assert off_by(sample_prompts(chunked(wan), positive, prompts(6)), expected) <= TOLERANCE
    assert torch.equal(sample_prompts(wan, positive, prompts(6)), expected)
