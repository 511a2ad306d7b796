"""Resuming a run of any sampler: the calls of the model that an earlier run has made are answered from disk.

Samplers keep state of all kinds between steps, and all of it follows from what the calls return. So a run that was cut
short starts again, and its first calls, the expensive part of it, cost nothing.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy.samplers import CFGGuider

from ...i2v_core.errors import RanOutError
from ...i2v_core.sampling.call_record import CallRecord, RunResults
from ...i2v_core.sampling.checkpoint import Checkpointing, CheckpointTimer, CheckpointWhen
from ...i2v_core.sampling.digest import digest
from ...i2v_core.sampling.record_file import Record
from ...i2v_core.units import format_gib
from .recorded_run import KnownModel, RecordedRun, known_models
from .run_identity import prompt_id, prompt_identity
from .services import Services

logger = logging.getLogger(__name__)

KEY = "i2v_resume"
"""Key of these wrappers among those of other nodes."""
_OBJECT_LEVELS = 2
"""How deep other nodes' objects are looked into, where no prompt tells what they were made of."""
_CALLBACK = 3
"""Place of the callback among the arguments that follow the latent."""


def resumable(patcher: Any, services: Services) -> Services:
    """Records the runs of a patcher's model; returns services whose lines tell of the record too."""
    patcher.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    checkpointing = services.checkpointing
    if checkpointing is None or checkpointing.when is CheckpointWhen.OFF:
        return services
    resume = _Resume(checkpointing, services)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, resume.outer_sample)
    return replace(services, say=resume.say)


class _Run:
    """A run of a sampler: what it is known by, and its record."""

    def __init__(
        self, guider: Any, inputs: Mapping[str, Any], checkpointing: Checkpointing, note: Callable[[str], None]
    ) -> None:
        prompt = prompt_identity()
        levels = _OBJECT_LEVELS if prompt is None else 0
        models = known_models(guider, levels)
        key = _key(models, prompt, {**inputs, "conds": guider.conds})
        self.record = CallRecord(checkpointing.folder / "calls", key)
        sigmas = inputs["sigmas"]
        timer = CheckpointTimer(checkpointing.when, len(sigmas) - 1)
        self.calls = RecordedRun(models, sigmas, self.record, timer, note)
        is_sure = prompt is not None and inputs.get("seed") is not None
        self.result_key = _result_key(key, guider, inputs) if is_sure else None
        """None where other runs might have the same: only a prompt tells them apart for sure."""
        self.callback: Callable[..., Any] | None = inputs.get("callback")
        self._last_step: tuple[int, Any, Any, int] | None = None

    def on_step(self, step: int, clean: Any, latent: Any, total_steps: int) -> None:
        """Passes a step on, and holds it: nodes take more than the result from the last one."""
        self._last_step = step, clean, latent, total_steps
        if self.callback is not None:
            self.callback(step, clean, latent, total_steps)

    def result(self, samples: Any) -> Record:
        """The result to keep, with the last step."""
        if self._last_step is None:
            return Record({"samples": samples}, {"video": prompt_id()})
        step, clean, latent, total_steps = self._last_step
        facts = {"video": prompt_id(), "step": step, "total_steps": total_steps}
        return Record({"samples": samples, "clean": clean, "latent": latent}, facts)

    def answer(self, result: Record, device: torch.device) -> Any:
        """Gives an earlier run's last step and result."""
        tensors = {name: it.to(device) for name, it in result.tensors.items()}
        if self.callback is not None and "step" in result.facts:
            self.callback(result.facts["step"], tensors["clean"], tensors["latent"], result.facts["total_steps"])
        return tensors["samples"]


class _Resume:
    """The wrapper around the runs of one model."""

    def __init__(self, checkpointing: Checkpointing, services: Services) -> None:
        self._checkpointing, self._services = checkpointing, services
        self._results = RunResults(checkpointing.folder / "results")
        self._line = ""
        self._notes: list[str] = []
        _forget_at_exit(checkpointing.folder / "results", services.is_whole)

    def say(self, line: str) -> None:
        """Shows a line to the user, with what is to be known of the record."""
        self._line = line
        self._services.say("\n".join(filter(None, [line, *self._notes])))

    def outer_sample(self, executor: Any, noise: Any, latent_image: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a whole run of a sampler."""
        self._line, self._notes = "", []
        self._results.forget(self._services.is_whole)
        run = self._run(executor.class_obj, noise, latent_image, args, kwargs)
        if run is None:
            return executor(noise, latent_image, *args, **kwargs)
        found = None if run.result_key is None else self._results.find(run.result_key)
        if found is not None:
            self._note("answered by the result of an earlier run, which was finished")
            return run.answer(found, executor.class_obj.model_patcher.load_device)
        try:
            with _around_calls(run.calls.diffusion_model, executor.class_obj.model_options):
                args, kwargs = _with_callback(args, kwargs, run.on_step)
                samples = executor(noise, latent_image, *args, **kwargs)
        except RanOutError as error:
            if run.calls.save():
                raise RanOutError(error.problem, f"{error.remedy}; queue again to resume") from None
            raise
        except BaseException:
            if run.calls.save():
                self._note(f"{format_gib(run.record.size_bytes)} of calls are kept: queue again to resume")
            raise
        self._finish(run, samples)
        return samples

    def _run(self, guider: Any, noise: Any, latent_image: Any, args: Any, kwargs: Any) -> _Run | None:
        """The run by what it is known by; None for one that is not recorded."""
        if guider.model_patcher.hook_patches:
            logger.info("this run is not recorded: hooks change the weights as it goes, which no call shows")
            return None
        try:
            bound = signature(CFGGuider.outer_sample).bind(guider, noise, latent_image, *args, **kwargs)
            return _Run(guider, bound.arguments, self._checkpointing, self._note)
        # Other nodes' objects are read, which may raise anything; that must not end a run.
        except Exception as error:
            logger.warning("this run is not recorded, since it cannot be told from others: %r", error)
            return None

    def _finish(self, run: _Run, samples: Any) -> None:
        """Keeps the result of a long run in place of its calls."""
        run.calls.finish()
        problem = None
        if run.result_key is not None and (run.record or run.calls.is_worthwhile):
            problem = self._results.save(run.result_key, run.result(samples))
        if problem is None:
            run.record.delete()

    def _note(self, line: str) -> None:
        logger.info("VRAM Fit: %s", line)
        self._notes.append(line)
        self.say(self._line)


def _key(models: list[KnownModel], prompt: str | None, inputs: Mapping[str, Any]) -> str:
    """A hash of what tells a run from others beside its calls. It must not differ when the run is queued again."""
    named = ("noise", "latent_image", "sigmas", "denoise_mask", "seed", "conds")
    return digest([[it.identity for it in models], prompt, {name: inputs.get(name) for name in named}])


def _result_key(key: str, guider: Any, inputs: Mapping[str, Any]) -> str:
    """A hash of all that a run depends on, its sampler and guider included."""
    settings = {name: it for name, it in vars(guider).items() if isinstance(it, (bool, int, float, str))}
    return digest([key, settings, guider.conds, inputs["sampler"]], object_levels=_OBJECT_LEVELS)


@contextmanager
def _around_calls(wrapper: Callable[..., Any], model_options: dict[str, Any]) -> Generator[None]:
    """Puts a wrapper around calls of the diffusion model, inside of all others: the last is the innermost."""
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, wrapper, model_options, is_model_options=True)
    try:
        yield
    finally:
        model_options["transformer_options"]["wrappers"][WrappersMP.DIFFUSION_MODEL].pop(KEY, None)


def _with_callback(
    args: tuple[Any, ...], kwargs: dict[str, Any], callback: Callable[..., Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another callback, in the place where it was given."""
    if len(args) > _CALLBACK:
        return (*args[:_CALLBACK], callback, *args[_CALLBACK + 1 :]), kwargs
    return args, {**kwargs, "callback": callback}


@cache
def _forget_at_exit(folder: Path, is_whole: Callable[[str], bool]) -> None:
    """Deletes the results of videos that are done when the program ends: no sampler may run before that."""
    atexit.register(RunResults(folder).forget, is_whole)
