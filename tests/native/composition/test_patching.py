"""VRAM Fit with nodes that copy, compile, merge or save a model, and its life beside the model without it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..conftest import TOLERANCE, Core, off_by
from .conftest import LATENT_SHAPE, Fits, Sample

pytestmark = pytest.mark.host


@pytest.fixture
def loadable(core: Core, make_patcher: Any) -> Callable[..., Any]:
    """Makes a patcher that core can load once more, for a copy of the model; `is_dynamic`: in core's dynamic memory."""

    class Dynamic(core.model_patcher.ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

    def load(disable_dynamic: bool = False) -> Any:
        return make_patcher("wan-t2v")

    def make(*, is_dynamic: bool = False) -> Any:
        patcher = load()
        patcher.cached_patcher_init = (load, ())
        if is_dynamic:
            patcher.__class__ = Dynamic
        return patcher

    return make


@pytest.fixture
def compiled(run_node: Any) -> Iterator[Callable[[Any], Any]]:
    """Core's node for torch.compile, without a compiler of machine code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda model: run_node("comfy_extras.nodes_torch_compile", "TorchCompileModel", model=model, backend="eager")
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_torch_compile(core: Core, make_patcher: Any, compiled: Any, chunked: Fits, sample: Sample, order: str) -> None:
    """It follows a block in chunks to its end, as it follows core's."""
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]
    from comfy.ldm.modules.attention import attention_pytorch  # pyright: ignore[reportMissingImports]

    queries: set[int] = set()

    def attention(_: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        queries.add(q.shape[1])
        return attention_pytorch(q, *args, **kwargs)

    patcher = make_patcher("wan-t2v", config={"num_layers": 1})
    patcher.model_options["transformer_options"]["optimized_attention_override"] = attention
    expected = sample(patcher, cfg=1.0, latent_shape=LATENT_SHAPE)
    queries.clear()
    model = compiled(chunked(patcher)) if order == "before" else chunked(compiled(patcher))
    chunked.fit_of(model).state.check_cancelled = management.throw_exception_if_processing_interrupted
    assert off_by(sample(model, cfg=1.0, latent_shape=LATENT_SHAPE), expected) <= TOLERANCE
    assert queries == {128, 16}
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert all("PlannedCall" in reason for reason in breaks), breaks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_copy_out_of_dynamic_memory_runs_its_own_layers(
    loadable: Any, compiled: Any, chunked: Fits, sample: Sample
) -> None:
    """TorchCompileModel loads the model again, so the fit's patches would run the first one's layers."""
    patcher = loadable(is_dynamic=True)
    fitted = chunked(patcher)
    copy = compiled(fitted)
    copy.remove_wrappers_with_key("apply_model", "torch.compile")
    assert copy.model is not fitted.model
    with torch.no_grad():
        for parameter in copy.model.parameters():
            parameter.mul_(1.1)
    plain = copy.clone()
    chunked.core.native("fit")._detach(plain)
    expected = sample(plain, latent_shape=LATENT_SHAPE)
    chunked.chunks = 0
    assert off_by(sample(copy, latent_shape=LATENT_SHAPE), expected) <= TOLERANCE
    assert chunked.chunks


@pytest.mark.parametrize("order", ["before", "after"])
def test_guidance_split_over_cards(
    loadable: Any, chunked: Fits, sample: Sample, run_node: Any, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Core calls the wrappers of the first card's model in the threads of all."""
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    devices = [torch.device("cpu"), torch.device("cpu", 1)]
    monkeypatch.setattr(management, "get_all_torch_devices", lambda **_: devices, raising=False)

    def split(model: Any) -> Any:
        management.unload_all_models()  # core looks among them for copies, and stumbles over one that has gone
        return run_node("comfy_extras.nodes_multigpu", "MultiGPUCFGSplitNode", model=model, max_gpus=2)

    expected = sample(split(loadable()), latent_shape=LATENT_SHAPE)
    one = chunked(loadable())
    sample(one, cfg=1.0, latent_shape=LATENT_SHAPE)
    of_one, chunked.chunks = chunked.chunks, 0
    model = split(chunked(loadable())) if order == "before" else chunked(split(loadable()))
    assert off_by(sample(model, latent_shape=LATENT_SHAPE), expected) <= TOLERANCE
    assert chunked.chunks == 2 * of_one, "a branch runs unchunked"


@pytest.mark.parametrize("fitted", ["first", "second", "merged"])
def test_merged_models(wan: Any, other: Any, chunked: Fits, sample: Sample, run_node: Any, fitted: str) -> None:
    def merge(first: Any, second: Any) -> Any:
        inputs = {"model1": first, "model2": second, "ratio": 0.3}
        return run_node("comfy_extras.nodes_model_merging", "ModelMergeSimple", **inputs)

    expected = sample(merge(wan, other), latent_shape=LATENT_SHAPE)
    first = chunked(wan) if fitted == "first" else wan
    second = chunked(other) if fitted == "second" else other
    merged = merge(first, second)
    result = sample(chunked(merged) if fitted == "merged" else merged, latent_shape=LATENT_SHAPE)
    assert off_by(result, expected) <= TOLERANCE
    assert bool(chunked.chunks) == (fitted != "second")


def test_a_fitted_model_is_saved_as_the_model_is(
    wan: Any, chunked: Fits, sample: Sample, run_node: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths  # pyright: ignore[reportMissingImports]
    from comfy_extras.nodes_model_merging import ModelSave  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    fitted = chunked(wan)
    sample(fitted, latent_shape=LATENT_SHAPE)
    for model, name in ((wan, "plain"), (fitted, "fitted")):
        ModelSave().save(model, name)
    plain, saved = (load_file(next(tmp_path.glob(f"{name}*"))) for name in ("plain", "fitted"))
    assert plain.keys() == saved.keys()
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


def test_a_model_with_and_without_in_turn(wan: Any, fits: Fits, chunked: Fits, sample: Sample) -> None:
    expected = sample(wan, latent_shape=LATENT_SHAPE)
    fitted, twice = chunked(wan), chunked(chunked(wan))
    for model in (fitted, wan, twice, fitted, wan):
        result = sample(model, latent_shape=LATENT_SHAPE)
        assert off_by(result, expected) <= TOLERANCE
        assert model is not wan or torch.equal(result, expected)


def test_a_fitted_model_is_freed(make_patcher: Any, chunked: Fits, sample: Sample) -> None:
    import comfy.model_management as management  # pyright: ignore[reportMissingImports]

    patcher = make_patcher("wan-t2v")
    fitted = chunked(patcher)
    sample(fitted, latent_shape=LATENT_SHAPE)
    alive = [weakref.ref(it) for it in (patcher.model, chunked.fit_of(fitted))]
    del patcher, fitted
    gc.collect()
    management.cleanup_models()
    assert [it() for it in alive] == [None, None]


def test_the_copy_that_another_nodes_patch_costs_is_predicted(
    core: Core, wan: Any, chunked: Fits, sample: Sample
) -> None:
    """A block does not overwrite its input where a patch may hold it."""
    memory = core.native("kernel_memory")
    peaks: list[int] = []

    def metered(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with memory.kernel_meter(torch.device("cpu"), "cpu") as measured:
            result = executor(*args, **kwargs)
        peaks.append(measured.peak_bytes)
        return result

    predicted: list[int] = []
    shape = (1, 16, 3, 16, 24)
    for patched in (False, True):
        fitted = chunked(wan)
        fitted.add_wrapper_with_key(core.extension.WrappersMP.DIFFUSION_MODEL, "metered", metered)
        attention = core.native("attention_memory").attention_output
        fitted.model_options["transformer_options"]["optimized_attention_override"] = attention
        if patched:
            fitted.set_model_double_block_patch(lambda given: {"img": given["img"]})
        sample(fitted, cfg=1.0, latent_shape=shape)
        fit = chunked.fit_of(fitted)
        call = min(fit._calls.values(), key=lambda it: it.input_bytes)
        native = core.native("model").native_model(fit.model)
        predicted.append(core.native("twin").Twin(native, fit.model, torch.float32).peak_bytes(call, 1))
    assert all(peak <= of_twin <= 1.05 * peak for peak, of_twin in zip(peaks, predicted, strict=True))
    assert peaks[1] > peaks[0]
