"""A run of any sampler behind VRAM Fit that was cut short is resumed: the undisturbed run's result, to the bit."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_host import model_case, setup
from comfy_host.in_process import native_modules

from .conftest import PACKAGE, SMALL_MODELS, Core, off_by

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("one_thread")]
SHAPE = (1, 16, 1, 4, 6)


class CutError(Exception):
    """Planted in a call of the model."""


class Calls:
    """Counts the calls of a model, and ends one of them with an error."""

    def __init__(self, layer: Any) -> None:
        self.count = 0
        self._cut_at = 0
        self._error: Exception = CutError()
        own = layer.forward

        def counted(x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            if self.count == self._cut_at:
                raise self._error
            return own(x)

        layer.forward = counted

    @contextmanager
    def cut(self, at: int, error: Exception = CutError(), match: str | None = None) -> Iterator[None]:  # noqa: B008
        """Ends the call of a number, from 1, with an error that comes out of the body."""
        self.count, self._cut_at, self._error = 0, at, error
        with pytest.raises(type(error), match=match):
            yield
        self._cut_at = 0

    def of(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int]:
        """The result of a run, and the number of calls that it made."""
        self.count = 0
        return run(), self.count


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run."""

    sampler: str = "euler"
    steps: int = 3
    seed: int = 1
    text: int = 2
    """Seed of the conditioning."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of core's function."""
    latent: torch.Tensor = field(default_factory=lambda: torch.zeros(SHAPE))


def run(core: Core, patcher: Any, settings: Settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(settings.text)
    positive, negative = ([[torch.randn(1, 20, 4096, generator=generator), {}]] for _ in range(2))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(settings.seed))
    return core.sample.sample(
        patcher,
        noise,
        settings.steps,
        3.0,
        settings.sampler,
        "simple",
        positive,
        negative,
        settings.latent,
        seed=settings.seed,
        disable_pbar=True,
        **settings.options,
    )


@dataclass
class Subject:
    """A small model, the folder of its records, and its calls."""

    core: Core
    patcher: Any
    calls: Calls
    folder: Path
    said: list[str] = field(default_factory=list)

    def recorded(self, when: str = "every step", patcher: Any = None, **services: Any) -> Any:
        """A clone whose runs are recorded."""
        fit, checkpoint = self.core.native("fit"), self.core.library("sampling.checkpoint")
        checkpointing = checkpoint.Checkpointing(folder=self.folder, when=checkpoint.CheckpointWhen(when))
        chosen = {"usable_bytes": lambda: 2**40, "check_cancelled": lambda: None, "say": self.said.append, **services}
        return fit.fitted(patcher or self.patcher, fit.Services(checkpointing=checkpointing, **chosen))[0]

    def run(self, patcher: Any, settings: Settings | None = None) -> torch.Tensor:
        return run(self.core, patcher, settings or Settings())

    def cut(self, patcher: Any, at: int = 3, settings: Settings | None = None) -> None:
        """Runs until a call fails."""
        with self.calls.cut(at):
            self.run(patcher, settings)

    def again(self, patcher: Any, settings: Settings | None = None) -> tuple[torch.Tensor, int]:
        """The result of the run that was cut short, and the calls that it still made."""
        return self.calls.of(lambda: self.run(patcher, settings))

    def files(self, pattern: str = "*") -> list[Path]:
        return [it for it in self.folder.rglob(pattern) if it.is_file()]


def small_wan(core: Core) -> Any:
    """A patcher with the same weights in any program."""
    model = model_case.model_of(SMALL_MODELS["wan-t2v"], torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    cpu = torch.device("cpu")
    return core.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def model(core: Core) -> tuple[Any, Calls]:
    patcher = small_wan(core)
    return patcher, Calls(patcher.model.diffusion_model.blocks[1].ffn[0])


@pytest.fixture
def subject(core: Core, model: tuple[Any, Calls], tmp_path: Path) -> Subject:
    return Subject(core, *model, tmp_path)


@pytest.fixture(scope="module")
def shared(core: Core, model: tuple[Any, Calls], tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Any]:
    """A subject and a recorded clone for many tests: its calls are planned once."""
    subject = Subject(core, *model, tmp_path_factory.mktemp("records"))
    return subject, subject.recorded()


def samplers() -> list[str]:
    native_modules(PACKAGE)
    from comfy.samplers import KSampler  # pyright: ignore[reportMissingImports]

    return list(KSampler.SAMPLERS)


@pytest.mark.parametrize("sampler", samplers())
def test_every_sampler_resumes(shared: tuple[Subject, Any], sampler: str) -> None:
    (subject, clone), settings = shared, Settings(sampler=sampler)
    expected, total = subject.calls.of(lambda: subject.run(subject.patcher, settings))
    assert torch.isfinite(expected).all()
    at = total // 2 + 1
    subject.cut(clone, at, settings)
    assert len(subject.files()) == 2 * (at - 1), "one for each guidance branch of a call"
    found, made = subject.again(clone, settings)
    assert torch.equal(found, expected)
    assert made == total - at + 1
    assert not subject.files()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_node_that_caches_between_steps_comes_to_the_same_state(subject: Subject, order: str) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode  # pyright: ignore[reportMissingImports]

    def cached(patcher: Any) -> Any:
        return EasyCacheNode.execute(patcher, 0.9, 0.0, 0.95, False).args[0]

    settings = Settings(steps=8)
    expected, total = subject.calls.of(lambda: subject.run(cached(subject.patcher), settings))
    assert total < 8, "it skips steps"
    clone = subject.recorded(patcher=cached(subject.patcher)) if order == "before" else cached(subject.recorded())
    subject.cut(clone, 3, settings)
    found, made = subject.again(clone, settings)
    assert torch.equal(found, expected)
    assert made == total - 2


def test_calls_that_differ_in_what_another_node_does_to_them(subject: Subject) -> None:
    """Skip-layer guidance repeats the call of a branch, with the same inputs and a block left out."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT  # pyright: ignore[reportMissingImports]

    def guided(patcher: Any) -> Any:
        return SkipLayerGuidanceDiT().execute(patcher, 3.0, 0.0, 1.0, "0", "", 0.0).args[0]

    expected, total = subject.calls.of(lambda: subject.run(guided(subject.patcher)))
    assert total == 6
    clone = guided(subject.recorded())
    subject.cut(clone, 6)
    found, made = subject.again(clone)
    assert torch.equal(found, expected)
    assert made == 1


def test_calls_that_no_input_tells_apart(subject: Subject) -> None:
    """Another node's function stays the same by name as what it does changes: the order of the calls tells."""

    def twice(executor: Any, *args: Any) -> list[torch.Tensor]:
        outputs: list[list[torch.Tensor]] = []
        for scale in (1.0, 0.5):
            scales.append(scale)
            outputs.append(executor(*args))
        return [one - other for one, other in zip(*outputs, strict=True)]

    def scaled(given: dict[str, Any]) -> dict[str, Any]:
        return {"img": given["img"] * scales[-1]}

    scales: list[float] = []
    patcher = subject.patcher.clone()
    patcher.set_model_patch(scaled, "double_block")
    patcher.add_wrapper_with_key(subject.core.extension.WrappersMP.CALC_COND_BATCH, "twice", twice)
    expected = subject.run(patcher)
    clone = subject.recorded(patcher=patcher)
    with running(graph(), "4"):
        subject.cut(clone, 5)
        found, made = subject.again(clone)
    assert torch.equal(found, expected)
    assert made == 2


def test_branches_that_run_apart_find_what_ran_together(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    clone, expected = subject.recorded(), subject.run(subject.patcher)
    subject.cut(clone, 3)
    monkeypatch.setattr(type(subject.patcher), "get_free_memory", lambda *_: 0)
    found, made = subject.again(clone)
    assert made == 2, "both branches of the third step"
    assert off_by(found, expected) <= 1e-6


def test_a_guiders_second_model(subject: Subject) -> None:
    nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    if not hasattr(nodes, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider with two models")
    from comfy.samplers import sampler_object  # pyright: ignore[reportMissingImports]

    def guided(own: Any, second: Any) -> torch.Tensor:
        guider = nodes.Guider_DualModel(own, second)
        text = torch.randn(1, 20, 4096, generator=torch.Generator().manual_seed(2))
        guider.set_conds([[text, {}]], [[text * 0.5, {}]])
        guider.set_cfg(3.0)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
        sigmas, latent = torch.tensor([1.0, 0.9, 0.0]), torch.zeros(SHAPE)
        return guider.sample(noise, latent, sampler_object("euler"), sigmas, disable_pbar=True, seed=1)

    second = with_lora(small_wan(subject.core), 1.0)
    expected = guided(subject.patcher, second)
    clone = subject.recorded()
    with subject.calls.cut(2):
        guided(clone, second)
    assert len(subject.files()) == 2
    found, made = subject.calls.of(lambda: guided(clone, second))
    assert torch.equal(found, expected)
    assert made == 1


def test_a_model_that_returns_a_list(
    core: Core, make_patcher: Callable[..., Any], sample: Callable[..., torch.Tensor], tmp_path: Path
) -> None:
    patcher = make_patcher("minimax_h3-t2v")
    subject = Subject(core, patcher, Calls(patcher.model.diffusion_model.final_layer.video_out), tmp_path)
    expected, total = subject.calls.of(lambda: sample(patcher, steps=2))
    clone = subject.recorded()
    with subject.calls.cut(total):
        sample(clone, steps=2)
    found, made = subject.calls.of(lambda: sample(clone, steps=2))
    assert torch.equal(found, expected)
    assert made == 1


@pytest.mark.parametrize("change", [{"seed": 9}, {"text": 9}, {"steps": 5}], ids=lambda it: next(iter(it)))
def test_another_run_finds_nothing(subject: Subject, change: dict[str, Any]) -> None:
    clone, settings = subject.recorded(), replace(Settings(), **change)
    expected, total = subject.calls.of(lambda: subject.run(subject.patcher, settings))
    subject.cut(clone)
    found, made = subject.again(clone, settings)
    assert torch.equal(found, expected)
    assert made == total
    assert subject.again(clone)[1] == 1, "the run that was cut short can be resumed still"


def test_a_call_of_another_sampler_is_answered_only_if_it_is_the_same(subject: Subject) -> None:
    """Both begin with the noise; no prompt tells them apart."""
    clone, settings = subject.recorded(), Settings(sampler="heun")
    expected, total = subject.calls.of(lambda: subject.run(subject.patcher, settings))
    subject.cut(clone)
    found, made = subject.again(clone, settings)
    assert torch.equal(found, expected)
    assert made == total - 2, "the first call, and that of heun's corrector, which is the second of euler"


def with_lora(patcher: Any, strength: float) -> Any:
    weight = patcher.model.diffusion_model.blocks[0].ffn[0].weight
    clone = patcher.clone()
    clone.add_patches({"diffusion_model.blocks.0.ffn.0.weight": (torch.full_like(weight, 0.1),)}, strength)
    return clone


def test_another_strength_of_a_lora_finds_nothing(subject: Subject) -> None:
    clones = [subject.recorded(patcher=with_lora(subject.patcher, strength)) for strength in (1.0, 0.9)]
    subject.cut(clones[0])
    assert subject.again(clones[1])[1] == 3
    expected = subject.run(with_lora(subject.patcher, 1.0))
    found, made = subject.again(subject.recorded(patcher=with_lora(subject.patcher, 1.0)))
    assert torch.equal(found, expected)
    assert made == 1


def test_another_file_of_weights_finds_nothing(subject: Subject) -> None:
    clone = subject.recorded()
    subject.cut(clone)
    weight = subject.patcher.model.diffusion_model.blocks[2].ffn[2].weight
    kept = weight.detach().clone()
    try:
        weight.data.mul_(1.5)
        assert subject.again(clone)[1] == 3
    finally:
        weight.data.copy_(kept)
    assert subject.again(clone)[1] == 1


def test_a_node_that_may_keep_state_beneath_the_record_turns_it_off(subject: Subject) -> None:
    clone, model = subject.recorded(), subject.patcher.model.diffusion_model
    model.forward_orig = partial(model.forward_orig)
    try:
        subject.cut(clone)
    finally:
        del model.forward_orig
    assert not subject.files()
    assert "another node has replaced forward_orig" in subject.said[-1]


# The prompt that runs.


class Prompt:
    """A graph as the host runs it."""

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self._nodes = nodes

    def get_node(self, node_id: str) -> Any:
        return self._nodes[node_id]

    def all_node_ids(self) -> set[str]:
        return set(self._nodes)


def graph(scale: float = 7.0, budget: str = "auto", first_id: int = 1) -> dict[str, Any]:
    loader, fit, patch, high, low = (str(first_id + index) for index in range(5))

    def sampler(latent: Any) -> dict[str, Any]:
        return {"class_type": "KSamplerAdvanced", "inputs": {"model": [patch, 0], "latent_image": latent}}

    return {
        loader: {"class_type": "UNETLoader", "inputs": {"unet_name": "wan.safetensors"}},
        fit: {"class_type": "I2VVRAMFit", "inputs": {"model": [loader, 0], "budget": budget, "checkpoint": "auto"}},
        patch: {"class_type": "NAGuidance", "inputs": {"model": [fit, 0], "nag_scale": scale}},
        high: sampler(None),
        low: sampler([high, 0]),
    }


@contextmanager
def running(nodes: Mapping[str, Any], node_id: str, prompt_id: str = "prompt") -> Iterator[None]:
    from comfy_execution import progress  # pyright: ignore[reportMissingImports]
    from comfy_execution.utils import CurrentNodeContext  # pyright: ignore[reportMissingImports]

    before = progress.global_progress_registry
    progress.reset_progress_state(prompt_id, Prompt(nodes))
    try:
        with CurrentNodeContext(prompt_id, node_id):
            yield
    finally:
        progress.global_progress_registry = before


@pytest.mark.parametrize(
    ("nodes", "sampler", "made"),
    [
        (graph(), "4", 1),
        (graph(budget="6"), "4", 1),
        (graph(first_id=10), "13", 1),
        (graph(scale=8.0), "4", 3),
        (graph(), "5", 3),
    ],
    ids=["the same", "a smaller budget", "other ids", "another widget", "another node"],
)
def test_all_that_a_sampler_is_computed_from_counts(
    subject: Subject, nodes: Mapping[str, Any], sampler: str, made: int
) -> None:
    clone = subject.recorded()
    with running(graph(), "4"):
        subject.cut(clone)
    with running(nodes, sampler):
        assert subject.again(clone)[1] == made


def test_two_experts_in_two_samplers(subject: Subject) -> None:
    """The first is whole when the second is cut short: its result is answered, then the second's calls."""
    models = [subject.patcher, with_lora(subject.patcher, 1.0)]
    first = Settings(steps=4, options={"start_step": 0, "last_step": 2, "force_full_denoise": False})
    second = replace(first, options={"start_step": 2, "last_step": 4, "disable_noise": True})
    clean = [subject.run(models[0], first)]
    expected = subject.run(models[1], replace(second, latent=clean[0]))

    def both(high: Any, low: Any) -> torch.Tensor:
        with running(graph(), "4"):
            steps: list[Any] = []
            options = {**first.options, "callback": lambda *step: steps.append(step)}
            latent = subject.run(high, replace(first, options=options))
        assert steps[-1][0] == 1
        assert steps[-1][1].shape == SHAPE
        last_steps.append(steps[-1])
        with running(graph(), "5"):
            return subject.run(low, replace(second, latent=latent))

    last_steps: list[Any] = []
    clones = [subject.recorded(patcher=it) for it in models]
    with subject.calls.cut(4):
        both(*clones)
    assert len(subject.files("*.result.safetensors")) == 1
    found, made = subject.calls.of(lambda: both(*clones))
    assert torch.equal(found, expected)
    assert made == 1
    for name in (1, 2):
        assert torch.equal(last_steps[0][name], last_steps[1][name]), "what nodes take from the last step"
    assert not subject.files("*.call.safetensors")
    done = subject.recorded(is_whole=lambda prompt: prompt == "prompt")
    with running(graph(scale=1.0), "4", "another"):
        subject.cut(done, 1)
    assert not subject.files(), "the prompt was run to its end"


def test_results_of_finished_prompts_go_when_the_program_ends(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[tuple[Any, ...]] = []
    monkeypatch.setattr(atexit, "register", lambda *call: ends.append(call))
    clone = subject.recorded(is_whole=lambda prompt: prompt == "prompt")
    with running(graph(), "4"):
        subject.run(clone)
    assert len(subject.files("*.result.safetensors")) == 1
    for end, *given in ends:
        end(*given)
    assert not subject.files()


def test_without_a_prompt_no_result_is_kept(subject: Subject) -> None:
    subject.run(subject.recorded())
    assert not subject.files()


# When, and on which disk.


def test_short_runs_are_not_recorded_unless_asked_to(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    subject.cut(subject.recorded("off"))
    subject.cut(subject.recorded("auto"))
    assert not subject.files()
    monkeypatch.setattr(subject.core.library("sampling.checkpoint"), "_WORTHWHILE_SECONDS", 0.0)
    subject.cut(subject.recorded("auto"))
    assert len(subject.files()) == 4, "written when it failed"
    assert "queue again to resume" in subject.said[-1]


def test_long_runs_are_written_every_half_minute(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock on which a call takes 25 seconds."""
    clone, seen = subject.recorded("auto"), list[int]()
    checkpoint, calls = subject.core.library("sampling.checkpoint"), subject.calls

    def after(*_: Any) -> None:
        seen.append(len(subject.files()))

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: 25.0 * calls.count)
    calls.count = 0
    subject.run(clone, Settings(steps=6, options={"callback": after}))
    assert seen == [0, 4, 4, 8, 8, 12]


def test_an_error_for_want_of_memory_says_that_it_can_be_resumed(subject: Subject) -> None:
    error = subject.core.library("errors").RanOutError("no memory", "use a smaller size")
    with subject.calls.cut(3, error, match="use a smaller size; queue again to resume"):
        subject.run(subject.recorded())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    """Damages a file as a loss of power may."""
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def take_anothers_place(file: Path) -> None:
    other = next(it for it in file.parent.iterdir() if it != file)
    file.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, take_anothers_place])
def test_a_damaged_or_foreign_file_is_set_aside(subject: Subject, damage: Callable[[Path], None]) -> None:
    clone, expected = subject.recorded(), subject.run(subject.patcher)
    subject.cut(clone)
    damage(min(subject.files()))
    found, made = subject.again(clone)
    assert torch.equal(found, expected)
    assert made == 2
    assert [it.suffix for it in subject.files()] == [".broken"]


def test_a_full_disk_is_told_once_and_stops_nothing(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, _: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_bytes", write)
    expected = subject.run(subject.patcher)
    assert torch.equal(subject.run(subject.recorded()), expected)
    assert subject.said[-1].count("the disk is full") == 1
    assert not subject.files()


def test_the_disk_that_calls_take_is_bounded(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.core.library("sampling.call_record"), "CALLS_LIMIT_BYTES", 4 * 16 * 24 * 4)
    clone, expected = subject.recorded(), subject.run(subject.patcher, Settings(steps=5))
    subject.cut(clone, 5, Settings(steps=5))
    assert len(subject.files()) == 4
    assert "have reached the limit" in subject.said[-1]
    found, made = subject.again(clone, Settings(steps=5))
    assert torch.equal(found, expected)
    assert made == 3


KILLED = f"""
import os, signal, sys
from pathlib import Path
sys.path[:0] = {[str(setup.PACK), str(setup.PACK / "scripts")]!r}
from tests.native import test_resume
test_resume.killed(Path(sys.argv[1]))
"""


def killed(folder: Path) -> None:
    """Runs in a program of its own, which ends without a word in the third call."""
    from . import conftest

    torch.set_num_threads(1)
    core = unwrap(conftest.core)()
    patcher = small_wan(core)
    calls = Calls(patcher.model.diffusion_model.blocks[1].ffn[0])
    clone = Subject(core, patcher, calls, folder).recorded()
    own = patcher.model.diffusion_model.blocks[0].ffn[0].forward

    def kill(x: torch.Tensor) -> torch.Tensor:
        if calls.count == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(x)

    patcher.model.diffusion_model.blocks[0].ffn[0].forward = kill
    run(core, clone, Settings(sampler="dpmpp_2m_sde"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no signal that kills")
def test_a_killed_program_is_resumed_by_another(subject: Subject) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(subject.folder)], check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    assert len(subject.files()) == 4
    settings = Settings(sampler="dpmpp_2m_sde")
    expected = subject.run(subject.patcher, settings)
    found, made = subject.again(subject.recorded(), settings)
    assert torch.equal(found, expected)
    assert made == 1
