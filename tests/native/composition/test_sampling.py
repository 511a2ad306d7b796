"""VRAM Fit with core's samplers, guiders and caches, and what else goes around a model's calls."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ..conftest import CASE, TOLERANCE, Core, off_by
from .conftest import LATENT_SHAPE, Fits, Sample

pytestmark = pytest.mark.host

CUSTOM = "comfy_extras.nodes_custom_sampler"
LONG_SHAPE = (1, 16, 9, 8, 24)
"""Of 33 frames: longer than a context window of 17."""


@pytest.fixture(scope="module")
def conditioning(wan: Any) -> Callable[[int], list[Any]]:
    """A prompt by its seed."""
    case = wan.get_attachment(CASE)
    return lambda seed: [case.conditioning(torch.Generator().manual_seed(seed), LATENT_SHAPE)]


MODEL_NODES = {
    "ModelSamplingSD3": ("comfy_extras.nodes_model_advanced", {"shift": 5.0}),
    "RescaleCFG": ("comfy_extras.nodes_model_advanced", {"multiplier": 0.7}),
    "CFGZeroStar": ("comfy_extras.nodes_cfg", {}),
    "CFGNorm": ("comfy_extras.nodes_cfg", {"strength": 0.9}),
    "TCFG": ("comfy_extras.nodes_tcfg", {}),
    "APG": ("comfy_extras.nodes_apg", {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.5}),
    "ScaleROPE": (
        "comfy_extras.nodes_rope",
        {"scale_x": 1.2, "shift_x": 0.0, "scale_y": 1.0, "shift_y": 1.0, "scale_t": 0.8, "shift_t": 0.0},
    ),
    "wanBlockSwap": ("comfy_extras.nodes_nop", {}),
}
"""Nodes that take a model and give one, with their inputs."""


@pytest.mark.parametrize("name", MODEL_NODES)
def test_nodes_that_change_guidance_or_steps(assert_composes: Any, run_node: Any, name: str) -> None:
    module, inputs = MODEL_NODES[name]
    assert_composes(lambda model: run_node(module, name, model=model, **inputs), steps=2)


def test_another_precision_of_computation(
    make_patcher: Any, chunked: Fits, sample: Sample, run_node: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is planned for before core has put it into the model."""
    caplog.set_level(logging.INFO)
    patcher = make_patcher("wan-t2v", dtype=torch.float16)

    def apply(model: Any) -> Any:
        return run_node("comfy_extras.nodes_model_advanced", "ModelComputeDtype", model=model, dtype="fp32")

    fitted = apply(chunked(patcher))
    result = sample(fitted, latent_shape=LATENT_SHAPE)
    assert off_by(result, sample(apply(patcher), latent_shape=LATENT_SHAPE)) <= TOLERANCE
    fit = chunked.fit_of(fitted)
    assert {key[0][1] for key in fit._plans} == {torch.float32}
    assert "plans with the first call" not in caplog.text


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches_skip_the_steps_that_they_skip_in_core(
    assert_composes: Any, run_node: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)

    def apply(model: Any) -> Any:
        inputs = {"reuse_threshold": 0.9, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
        return run_node("comfy_extras.nodes_easycache", f"{name}Node", model=model, **inputs)

    assert_composes(apply, steps=6)
    skipped = [it.getMessage() for it in caplog.records if it.getMessage().startswith(f"{name} - skipped")]
    assert len(skipped) == 4
    assert len(set(skipped)) == 1
    assert "skipped 0/" not in skipped[0]


def test_an_out_of_memory_is_not_seen_by_other_nodes(core: Core, wan: Any, fits: Fits, sample: Sample) -> None:
    """The call that is made again is the model's own, inside of their wrappers, which may count or cache calls."""
    calls: list[int] = []

    def counting(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return executor(*args, **kwargs)

    fitted = fits(wan)
    fitted.add_wrapper_with_key(core.extension.WrappersMP.DIFFUSION_MODEL, "another node", counting)
    failures = iter([False, True, False])
    layer = wan.model.diffusion_model.blocks[1].ffn[0]

    def fails(x: torch.Tensor) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("a planted one")
        return type(layer).forward(layer, x)

    layer.forward = fails
    try:
        sample(fitted, steps=3, cfg=1.0, latent_shape=LATENT_SHAPE)
    finally:
        del layer.forward
    assert any(line.startswith("ran out of memory") for line in fits.said)
    assert len(calls) == 3


@pytest.mark.parametrize("has_picture", [False, True])
def test_context_windows(assert_composes: Any, make_patcher: Any, run_node: Any, has_picture: bool) -> None:
    """A start picture is as long as the clip, and core cuts it too."""

    def conditioning(generator: torch.Generator, shape: tuple[int, ...]) -> list[Any]:
        picture = {
            "concat_latent_image": torch.randn(shape, generator=generator),
            "concat_mask": torch.ones(1, 1, 9, 8, 24),
        }
        return [torch.randn(1, 20, 4096, generator=generator), picture if has_picture else {}]

    patcher = make_patcher("wan-i2v" if has_picture else "wan-t2v")
    patcher.set_attachments(CASE, replace(patcher.get_attachment(CASE), conditioning=conditioning))
    assert_composes(lambda model: windowed(run_node, model), patcher, latent_shape=LONG_SHAPE)


def windowed(run_node: Any, model: Any) -> Any:
    return run_node(
        "comfy_extras.nodes_context_windows",
        "WanContextWindowsManualNode",
        model=model,
        context_length=17,
        context_overlap=5,
        context_schedule="standard_uniform",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        freenoise=False,
    )


@pytest.mark.parametrize("is_before", [True, False])
def test_a_clip_in_context_windows_is_planned_for_a_window(
    core: Core, wan: Any, fits: Fits, sample: Sample, run_node: Any, is_before: bool
) -> None:
    whole = fits(wan)
    sample(whole, latent_shape=LONG_SHAPE)
    fitted = windowed(run_node, fits(wan)) if is_before else fits(windowed(run_node, wan))
    sample(fitted, latent_shape=LONG_SHAPE)
    assert fits.fit_of(fitted).plan.stock_bytes < 0.75 * fits.fit_of(whole).plan.stock_bytes


@pytest.fixture
def custom_sample(run_node: Any, conditioning: Any) -> Callable[..., torch.Tensor]:
    """Samples with a guider, through core's SamplerCustomAdvanced."""

    def sample(guider: Any, model: Any, sampler: str = "euler", mask: torch.Tensor | None = None) -> torch.Tensor:
        latent = {"samples": torch.full(LATENT_SHAPE, 0.5)}
        if mask is not None:
            latent["noise_mask"] = mask
        return run_node(
            CUSTOM,
            "SamplerCustomAdvanced",
            noise=run_node(CUSTOM, "RandomNoise", noise_seed=3),
            guider=guider,
            sampler=run_node(CUSTOM, "KSamplerSelect", sampler_name=sampler),
            sigmas=run_node(CUSTOM, "BasicScheduler", model=model, scheduler="simple", steps=2, denoise=1.0),
            latent_image=latent,
        )["samples"]

    return sample


GUIDERS = {
    "BasicGuider": (CUSTOM, lambda prompt: {"conditioning": prompt(4)}),
    "CFGGuider": (CUSTOM, lambda prompt: {"positive": prompt(4), "negative": prompt(5), "cfg": 4.0}),
    "DualCFGGuider": (
        CUSTOM,
        lambda prompt: {
            "cond1": prompt(4),
            "cond2": prompt(5),
            "negative": prompt(6),
            "cfg_conds": 5.0,
            "cfg_cond2_negative": 3.0,
            "style": "regular",
        },
    ),
    "PerpNegGuider": (
        "comfy_extras.nodes_perpneg",
        lambda prompt: {
            "positive": prompt(4),
            "negative": prompt(5),
            "empty_conditioning": prompt(6),
            "cfg": 4.0,
            "neg_scale": 1.0,
        },
    ),
}
"""Nodes that make a guider of a model, with their other inputs."""


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(wan: Any, chunked: Fits, run_node: Any, conditioning: Any, custom_sample: Any, name: str) -> None:
    module, inputs = GUIDERS[name]

    def run(model: Any) -> torch.Tensor:
        return custom_sample(run_node(module, name, model=model, **inputs(conditioning)), model)

    assert off_by(run(chunked(wan)), run(wan)) <= TOLERANCE
    assert chunked.chunks


@pytest.mark.parametrize("fitted", ["first", "second", "both"])
def test_a_guider_of_two_models(
    wan: Any,
    other: Any,
    chunked: Fits,
    run_node: Any,
    conditioning: Any,
    custom_sample: Any,
    fitted: str,
) -> None:
    """Core calls the first model's wrappers around the second model's calls as well."""

    def run(first: Any, second: Any) -> torch.Tensor:
        inputs = {"positive": conditioning(4), "negative": conditioning(5), "cfg": 4.0}
        guider = run_node(CUSTOM, "DualModelGuider", model=first, model_negative=second, **inputs)
        return custom_sample(guider, first)

    expected = run(wan, other)
    first = wan if fitted == "second" else chunked(wan)
    second = other if fitted == "first" else chunked(other)
    assert off_by(run(first, second), expected) <= TOLERANCE
    of_one = chunked.chunks
    assert of_one
    if fitted == "both":
        chunked.chunks = 0
        run(first, other)
        assert of_one == 2 * chunked.chunks


def test_what_core_is_told_is_of_the_fitted_model(wan: Any, other: Any, fits: Fits, sample: Sample) -> None:
    """And not of a guider's second model."""
    fitted = fits(wan)
    sample(fitted, cfg=1.0, latent_shape=LATENT_SHAPE)

    def is_told(model: Any, *_: Any) -> bool:
        return "memory_required" in vars(model)

    fit, latent = fits.fit_of(fitted), torch.zeros(LATENT_SHAPE)
    assert fit.calc_cond_batch(is_told, wan.model, [], latent, None, {})
    assert not fit.calc_cond_batch(is_told, other.model, [], latent, None, {})


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "uni_pc", "heun"])
def test_samplers(wan: Any, chunked: Fits, run_node: Any, conditioning: Any, custom_sample: Any, sampler: str) -> None:
    def run(model: Any) -> torch.Tensor:
        guider = run_node(CUSTOM, "BasicGuider", model=model, conditioning=conditioning(4))
        return custom_sample(guider, model, sampler)

    assert off_by(run(chunked(wan)), run(wan)) <= TOLERANCE


def test_a_mask_of_what_is_sampled(
    wan: Any, chunked: Fits, run_node: Any, conditioning: Any, custom_sample: Any
) -> None:
    mask = torch.linspace(0, 1, LATENT_SHAPE[-1]).expand(1, *LATENT_SHAPE[-2:])

    def run(model: Any) -> torch.Tensor:
        model = run_node("comfy_extras.nodes_differential_diffusion", "DifferentialDiffusion", model=model)
        guider = run_node(CUSTOM, "BasicGuider", model=model, conditioning=conditioning(4))
        return custom_sample(guider, model, mask=mask)

    assert off_by(run(chunked(wan)), run(wan)) <= TOLERANCE


def test_two_experts_share_the_steps(wan: Any, other: Any, chunked: Fits, run_node: Any, conditioning: Any) -> None:
    """Wan 2.2: one model for the noisy steps, another for the rest."""

    def run(high: Any, low: Any) -> torch.Tensor:
        steps = {"noise_seed": 3, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}
        prompts = {"positive": conditioning(4), "negative": conditioning(5)}
        latent = {"samples": torch.zeros(LATENT_SHAPE)}
        for model, start, end in ((high, 0, 2), (low, 2, 4)):
            latent = run_node(
                "nodes",
                "KSamplerAdvanced",
                model=model,
                add_noise="enable" if start == 0 else "disable",
                start_at_step=start,
                end_at_step=end,
                return_with_leftover_noise="enable" if end < 4 else "disable",
                latent_image=latent,
                **steps,
                **prompts,
            )
        return latent["samples"]

    expected = run(wan, other)
    assert off_by(run(chunked(wan), chunked(other)), expected) <= TOLERANCE
    assert torch.equal(run(wan, other), expected)
