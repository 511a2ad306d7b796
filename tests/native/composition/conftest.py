"""Core's own nodes, run on a small Wan with and without VRAM Fit."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ..conftest import TOLERANCE, Core, off_by

LATENT_SHAPE = (1, 16, 3, 8, 24)
"""144 tokens: two chunks of the smallest size."""

Sample = Callable[..., torch.Tensor]
Apply = Callable[[Any], Any]
"""A node's work on a model: takes a patcher, returns another."""


@pytest.fixture(scope="module", autouse=True)
def _quick(one_thread: None) -> None:
    """These models are too small for more threads."""


@pytest.fixture(scope="session")
def run_node(core: Core) -> Iterator[Callable[..., Any]]:
    """Runs a node of core's by its module and class; returns its first output.

    The test is skipped where this version of core has no such node.
    """
    folder = Path(str(importlib.import_module("folder_paths").__file__)).parent
    spec = util.spec_from_file_location("nodes", folder / "nodes.py")  # this pack has a folder of the same name
    assert spec is not None
    assert spec.loader is not None
    before = sys.modules.get("nodes")
    sys.modules["nodes"] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["nodes"])

    def run(module: str, name: str, **inputs: Any) -> Any:
        try:
            node = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            pytest.skip(f"this ComfyUI has no node {name}")
        if hasattr(node, "FUNCTION") and not hasattr(node, "execute"):
            return getattr(node(), node.FUNCTION)(**inputs)[0]
        return node.execute(**inputs).result[0]

    yield run
    if before is None:
        del sys.modules["nodes"]
    else:
        sys.modules["nodes"] = before


@dataclass(slots=True)
class Fits:
    """Fits models such that their layers run in the smallest chunks, on whatever clone they end up."""

    core: Core
    chunks: int = 0
    """Chunks that have run."""
    said: list[str] = field(default_factory=list)

    def __call__(self, patcher: Any, usable_bytes: int = 2**40) -> Any:
        fit = self.core.native("fit")
        services = fit.Services(usable_bytes=lambda: usable_bytes, check_cancelled=self._count, say=self.said.append)
        return fit.fitted(patcher, services)[0]

    def fit_of(self, patcher: Any) -> Any:
        return patcher.get_attachment(self.core.native("fit").KEY)

    def _count(self) -> None:
        self.chunks += 1


@pytest.fixture
def fits(core: Core) -> Fits:
    """Fits models with plans of their own."""
    return Fits(core)


@pytest.fixture
def chunked(core: Core, fits: Fits, monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Fits models such that every layer runs in the smallest chunks, whatever was planned."""
    fitted_model = core.native("fitted_model").FittedModel
    plan_of = fitted_model._plan_of
    monkeypatch.setattr(fitted_model, "_plan_of", lambda fit, call: replace(plan_of(fit, call), workspace_bytes=1))
    return fits


@pytest.fixture(scope="module")
def wan(make_patcher: Callable[..., Any]) -> Any:
    """A small Wan; tests change clones of it only."""
    return make_patcher("wan-t2v")


@pytest.fixture(scope="module")
def other(make_patcher: Callable[..., Any]) -> Any:
    """A second model, of other weights."""
    patcher = make_patcher("wan-t2v")
    with torch.no_grad():
        for parameter in patcher.model.parameters():
            parameter.mul_(1.1)
    return patcher


@pytest.fixture
def assert_composes(
    chunked: Fits, wan: Any, sample: Sample, caplog: pytest.LogCaptureFixture
) -> Callable[..., torch.Tensor]:
    """Holds a node's model with VRAM Fit, before and after it, against the same without; returns that result."""
    caplog.set_level(logging.INFO)

    def check(apply: Apply, patcher: Any = None, tolerance: float = TOLERANCE, **sampling: Any) -> torch.Tensor:
        patcher = patcher or wan
        sampling = {"latent_shape": LATENT_SHAPE, **sampling}
        expected = sample(apply(patcher), **sampling)
        for order, fitted in (("before", apply(chunked(patcher))), ("after", chunked(apply(patcher)))):
            chunked.chunks = 0
            result = sample(fitted, **sampling)
            assert off_by(result, expected) <= tolerance, f"VRAM Fit {order} the node"
            assert chunked.chunks, f"VRAM Fit {order} the node runs unchunked"
            assert "plans with the first call" not in caplog.text, f"VRAM Fit {order} the node cannot plan before"
        assert torch.equal(sample(apply(patcher), **sampling), expected), "core's own run is not what it was"
        return expected

    return check


@pytest.fixture
def lora_file(wan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a LoRA for core's loaders, of every linear layer of one block."""
    import folder_paths  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in wan.model.diffusion_model.blocks[1].named_parameters():
        if name.endswith(".weight") and parameter.ndim == 2:
            key = f"diffusion_model.blocks.1.{name.removesuffix('.weight')}"
            rows, columns = parameter.shape
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    save_file(tensors, tmp_path / "small.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return "small.safetensors"
