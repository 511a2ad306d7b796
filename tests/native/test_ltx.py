"""Core's LTX models in chunks: what they keep for all tokens, what other nodes see, and what is known before a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy_host import model_case
from comfy_host.model_case import ModelCase

from .conftest import SMALL_MODELS, TOLERANCE, Core, by_place, off_by

pytestmark = pytest.mark.host


def foreseen(core: Core, base: Any, case: ModelCase) -> Any:
    """The call that a sampler will make of a case."""
    import comfy.sampler_helpers  # pyright: ignore[reportMissingImports]
    import comfy.utils  # pyright: ignore[reportMissingImports]

    latent = model_case.latent_of(case, torch.zeros)
    packed, shapes = comfy.utils.pack_latents(latent.unbind()) if latent.is_nested else (latent, [latent.shape])
    conditioning = case.conditioning(torch.Generator(), case.latent_shape)
    conds = {"positive": comfy.sampler_helpers.convert_cond([conditioning])}
    (found,) = core.native("recorded_call").recorded_calls(base, packed.shape, conds, latent_shapes=shapes)
    return found.call


@pytest.mark.parametrize("name", ["ltx-i2v", "ltx-av-silent"])
def test_little_is_kept_for_all_tokens(core: Core, name: str) -> None:
    """Beside the hidden state, keys and values: no rotary tables, and no modulation of each token."""
    case = replace(SMALL_MODELS[name], latent_shape=(1, 128, 16, 30, 40), audio_latent_shape=None)
    base = model_case.model_of(case, torch.float32, "meta")
    call = foreseen(core, base, case)

    def fused(_chosen: Any, query: torch.Tensor, *_args: Any, **_options: Any) -> torch.Tensor:
        return torch.empty_like(query)

    native, model = core.native("ltx").MODEL, base.diffusion_model
    twin = core.native("twin").Twin(native, model, torch.float32, attention=fused)
    hidden_bytes = 16 * 30 * 40 * base.diffusion_model.inner_dim * 4
    assert twin.peak_bytes(call, 1) < 3.5 * hidden_bytes
    assert twin.peak_bytes(call, None) > 10 * hidden_bytes


def test_the_text_is_not_finished_to_foresee_a_call(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor]
) -> None:
    """LTX-2's transformers for that take seconds on a CPU; planning needs the shape alone."""
    patcher = make_patcher("ltx-23")
    model, ran = patcher.model.diffusion_model, []
    for connector in (model.video_embeddings_connector, model.audio_embeddings_connector):
        connector.transformer_1d_blocks[0].register_forward_hook(lambda *_: ran.append(1))
    case = SMALL_MODELS["ltx-23"]
    embedding, _ = case.conditioning(torch.Generator(), case.latent_shape)
    finished = model.preprocess_text_embeds(embedding, unprocessed=True)
    ran.clear()
    call = foreseen(core, patcher.model, case)
    assert call.arguments["context"].shape == finished.shape
    assert not ran


def test_masks_of_video_and_audio_through_the_sampler(core: Core, make_patcher: Callable[..., Any]) -> None:
    """The call is the one that was foreseen, and the result core's own."""
    case = SMALL_MODELS["ltx-av"]
    patcher = make_patcher("ltx-av")
    generator = torch.Generator().manual_seed(1)
    noise = model_case.latent_of(case, lambda shape: torch.randn(shape, generator=generator))
    video, audio = torch.ones(1, 1, 4, 1, 1), torch.ones(1, 1, 140, 1)
    video[:, :, 0] = 0.2
    audio[:, :, :30] = 0
    masks = type(noise)([video, audio])
    positive = [case.conditioning(generator, case.latent_shape)]

    def run(model: Any) -> torch.Tensor:
        result = core.sample.sample(
            model,
            noise,
            1,
            1.0,
            "euler",
            "simple",
            positive,
            positive,
            model_case.latent_of(case, torch.zeros),
            noise_mask=masks,
            seed=1,
            disable_pbar=True,
        )
        return torch.cat([it.flatten() for it in result.unbind()])

    expected = run(patcher)
    assert off_by(run(core.chunked(patcher, 1)), expected) <= TOLERANCE
    fit = core.native("fit")
    clone, _ = fit.fitted(patcher, fit.Services(usable_bytes=lambda: 2**40, check_cancelled=lambda: None))
    assert torch.equal(run(clone), expected)
    plans = clone.get_attachment(fit.KEY)._plans
    assert len(plans) == 2, "calls of one branch and of both are foreseen, and there are no others"


@pytest.mark.parametrize("name", ["ltx-guides", "ltx-av-guides"])
def test_a_block_that_another_node_wraps_gets_what_core_gives_it(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], name: str
) -> None:
    seen: list[list[str]] = []

    def kinds(value: Any) -> Any:
        return [kinds(it) for it in value] if isinstance(value, (list, tuple)) else type(value).__name__

    def twice(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        seen.append(sorted(f"{key}: {kinds(it)}" for key, it in args.items()))
        extra["original_block"](args)
        return extra["original_block"](args)

    patcher = make_patcher(name)
    patcher.set_model_patch_replace(twice, "dit", "double_block", 1)
    expected, calls = sample(patcher), len(seen)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE
    assert calls
    assert seen[:calls] == seen[calls:]


@pytest.mark.parametrize("layer", ["attn1", "attn2", "audio_to_video_attn", "video_to_audio_attn", "ff", "audio_ff"])
def test_layers_that_another_node_has_replaced(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], layer: str
) -> None:
    patcher = make_patcher("ltx-23")
    for index, block in enumerate(patcher.model.diffusion_model.transformer_blocks):
        patcher.add_object_patch(
            f"diffusion_model.transformer_blocks.{index}.{layer}.forward", by_place(getattr(block, layer))
        )
    expected = sample(patcher)
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "method",
    [
        "_prepare_timestep",
        "_prepare_positional_embeddings",
        "_precompute_freqs_cis",
        "_build_guide_self_attention_mask",
        "_process_transformer_blocks",
        "_process_output",
        "transformer_blocks.1.forward",
        "transformer_blocks.0.attn1.forward",
    ],
)
def test_any_part_of_a_call_may_be_another_nodes(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], method: str
) -> None:
    """Its input and its output have core's form."""
    patcher = make_patcher("ltx-guides")
    owner = patcher.model.diffusion_model
    *path, name = method.split(".")
    for attribute in path:
        owner = getattr(owner, attribute)
    own = getattr(type(owner), name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return own(owner, *args, **kwargs)

    expected = sample(patcher)
    patcher.add_object_patch(f"diffusion_model.{method}", replaced)
    clone = core.chunked(patcher, 1)
    assert off_by(sample(clone), expected) <= TOLERANCE


@pytest.mark.parametrize("option", ["run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn"])
def test_parts_of_a_block_that_are_switched_off(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], option: str
) -> None:
    patcher = make_patcher("ltx-av")
    everything = sample(patcher)
    patcher.model_options.setdefault("transformer_options", {})[option] = False
    expected = sample(patcher)
    assert off_by(expected, everything) > 1e-3
    assert off_by(sample(core.chunked(patcher, 1)), expected) <= TOLERANCE


def test_weights_are_cast_as_often_as_in_core(
    core: Core,
    make_patcher: Callable[..., Any],
    sample: Callable[..., torch.Tensor],
    casts_of: Callable[[torch.dtype], list[str]],
) -> None:
    """However many chunks a layer runs in."""
    patcher = make_patcher("ltx-23", dtype=torch.float16, compute_dtype=torch.float32)
    casts = casts_of(torch.float16)
    expected, of_core = sample(patcher, cfg=1.0), len(casts)
    result = sample(core.chunked(patcher, 1), cfg=1.0)
    assert off_by(result, expected) <= TOLERANCE
    assert len(casts) - of_core == of_core
