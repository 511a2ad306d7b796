"""VRAM Fit in a real host between core's own loader and samplers, with small Wan models from files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy_host.client import Client, Event, ExecutionError, PromptRefusedError
from comfy_host.server import Server

from .native_graphs import latent_of, node, sampler, write_wan

HIGH, LOW = "fit/high_noise.safetensors", "fit/low_noise.safetensors"
SIZE = {"width": 160, "height": 160, "length": 17, "batch_size": 1}
CHUNKED = "48MiB"
"""Less than core's own call takes with the weights: most of it are the wide inner tensors of feed-forwards."""


@pytest.fixture(scope="module")
def experts(server: Server) -> Iterator[None]:
    """Two models as files of core's own layout, which its loaders recognise."""
    files = [server.models_folder / "diffusion_models" / name for name in (HIGH, LOW)]
    files[0].parent.mkdir(parents=True)
    for seed, file in enumerate(files):
        write_wan(file, ffn_dim=8192, seed=seed)
    yield
    for file in files:
        file.unlink()
    files[0].parent.rmdir()


def prompt_of(budget: str | None, seed: int = 1) -> dict[str, Any]:
    """Wan 2.2's two experts one after another, each with two steps; None: without VRAM Fit."""

    settings = {"noise_seed": seed, "steps": 4, "sampler_name": "euler"}
    prompt = {
        "high": node("UNETLoader", unet_name=HIGH, weight_dtype="default"),
        "low": node("UNETLoader", unet_name=LOW, weight_dtype="default"),
        "text": node("LotusConditioning"),
        "empty": node("EmptyHunyuanLatentVideo", **SIZE),
        "first": sampler(["high", 0], "empty", 0, 2, **settings),
        "second": sampler(["low", 0], "first", 2, 4, **settings),
        "save": node("SaveLatent", samples=["second", 0], filename_prefix=f"fit_{budget}"),
    }
    if budget is not None:
        prompt["fit"] = node("I2VVRAMFit", model=["high", 0], model_2=["low", 0], budget=budget)
        prompt["first"]["inputs"]["model"], prompt["second"]["inputs"]["model"] = ["fit", 0], ["fit", 1]
    return prompt


def sampled(client: Client, server: Server, budget: str | None, events: list[Event] | None = None) -> torch.Tensor:
    """The latent that a run saves."""
    run = client.run(prompt_of(budget), watch=(events if events is not None else []).append)
    return latent_of(run, server)


def texts(events: list[Event], node: str) -> list[str]:
    return [it.data["text"] for it in events if it.kind == "progress_text" and it.data["node"] == node]


def test_the_latent_is_cores_own(client: Client, server: Server, experts: None) -> None:
    expected = sampled(client, server, None)
    assert expected.shape == (1, 16, 5, 20, 20)
    assert expected.std() > 0.1
    events: list[Event] = []
    result = sampled(client, server, CHUNKED, events)
    assert float((result - expected).abs().max() / expected.abs().max()) <= 1e-5
    for name in ("first", "second"):
        assert any("in chunks of" in text for text in texts(events, name)), texts(events, name)
        assert any(text.startswith("sampled: predicted") for text in texts(events, name))
    # Without the node, core's own run is the same again.
    assert torch.equal(sampled(client, server, None), expected)


def test_its_report_is_shown_on_the_node(client: Client, experts: None) -> None:
    prompt = {name: node for name, node in prompt_of("auto").items() if name in ("high", "low", "fit")}
    prompt["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["fit", 3]}}
    run = client.run(prompt)
    (text,) = run.outputs["fit"]["text"]
    assert [line.partition(":")[0] for line in text.splitlines()] == ["Wan", "Wan"]
    assert text.count("layers run within the budget") == 2
    assert run.outputs["report"]["text"] == [text]


def test_a_run_that_cannot_fit_is_refused_before_its_first_step(client: Client, experts: None) -> None:
    events: list[Event] = []
    with pytest.raises(ExecutionError) as refused:
        client.run(prompt_of("4MiB", seed=2), watch=events.append)
    assert refused.value.node_id == "first"
    assert refused.value.exception_type.rpartition(".")[2] == "DoesNotFitError"
    assert re.search(r"160×160×\d+ with Wan does not fit.*Remedy: use ", refused.value.message)
    steps = [it for it in events if it.kind == "progress" and it.data["node"] == "first" and it.data["value"] > 0]
    assert steps == []
    (started,) = (it for it in events if it.kind == "execution_start")
    status = client.history(started.data["prompt_id"])["status"]
    assert status["status_str"] == "error"
    (error,) = (data for kind, data in status["messages"] if kind == "execution_error")
    assert error["exception_message"].strip() == refused.value.message


@pytest.mark.parametrize(("budget", "said"), [("much", "much"), ("-1", "-1"), ("", "")])
def test_a_budget_that_is_none_is_refused_at_once(client: Client, experts: None, budget: str, said: str) -> None:
    with pytest.raises(PromptRefusedError) as refused:
        client.queue(prompt_of(budget))
    (error,) = refused.value.node_errors["fit"]["errors"]
    assert said in error["details"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": 5}, "model is 5, which is not a model of ComfyUI's. Remedy: connect one of its loaders"),
        ({"model_2": "low"}, "model_2 is 'low', which is not a model of ComfyUI's"),
        ({"vae": 3}, "vae is 3, which is not a VAE of ComfyUI's. Remedy: connect Load VAE"),
    ],
    ids=["model", "model_2", "vae"],
)
def test_what_is_no_model_is_refused(client: Client, experts: None, given: dict[str, Any], said: str) -> None:
    """A prompt can hold anything in place of a link."""
    prompt = {name: node for name, node in prompt_of("auto").items() if name in ("high", "fit")}
    prompt["fit"]["inputs"] = {"model": ["high", 0], "budget": "auto", **given}
    prompt["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["fit", 3]}}
    with pytest.raises(ExecutionError) as refused:
        client.run(prompt)
    assert said in refused.value.message
