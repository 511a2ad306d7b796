"""Sample several clips in the same calls of the denoiser, each with the result that it has alone.

Whatever goes wrong, none loses a step: the clips that are left go on alone, from where each of them is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import I2VError
from ..families import I2VModel
from ..planning.plan import Plan, Stage
from ..sampling.checkpoint import Checkpointing
from ..sampling.state import LoopState
from .batched_loop import BatchedLoop
from .clip_sampler import ClipSampler, SampleRequest, check_finite
from .run import StageRun, running
from .runtime import Runtime, StageReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedResult:
    """How it went, by the clips' indices. `samples` are those of clips that are done, as by `sample`; `states` are, in
    host memory, where others go on alone, and `problem` says why they do.
    """

    samples: Mapping[int, Tensor]
    states: Mapping[int, LoopState]
    problem: Exception | None
    report: StageReport


class NotWorthBatchingError(Exception):
    """Steps together take longer than one after another."""


def sample_batched(
    model: I2VModel,
    plan: Plan,
    clips: Sequence[SampleRequest],
    runtime: Runtime,
    checkpointing: Checkpointing | None,
    pays: Callable[[float], bool],
    left: Callable[[int, Exception], None],
) -> BatchedResult:
    """Clips of one model, size, number of steps and scheduler, sampled by a plan for so many (`Request.clips`).

    Args:
        runtime: its `check_cancelled` is for all: what that raises in the middle of a step ends them all.
        pays: told the seconds of each step of all clips but the first, which warms up; False sends them on alone.
        left: told of each clip whose own `check_cancelled` has raised, after the step, and of what that was. Its
            checkpoint is kept.
    """
    with running(Stage.SAMPLE, model, plan, runtime) as run:
        group = _Group(run, clips, checkpointing, pays, left)
        problem = group.finish()
        states = {} if problem is None else group.states()
    samples: dict[int, Tensor] = {}
    for index, found in group.samples.items():
        try:
            check_finite(plan, found)
            samples[index] = found
        except I2VError as error:
            left(index, error)
    return BatchedResult(samples=samples, states=states, problem=problem, report=run.report())


class _Group:
    """`samples` are there when all clips that stay are done."""

    def __init__(
        self,
        run: StageRun,
        clips: Sequence[SampleRequest],
        checkpointing: Checkpointing | None,
        pays: Callable[[float], bool],
        left: Callable[[int, Exception], None],
    ) -> None:
        self._run, self._pays, self._left = run, pays, left
        clips_under_way = [ClipSampler(run, clip, checkpointing) for clip in clips]
        self.samples: dict[int, Tensor] = {}
        self._index = {id(clip): index for index, clip in enumerate(clips_under_way)}
        self._lockstep = BatchedLoop(run, clips_under_way, self._after_step)
        self._since: tuple[int, float] | None = None
        """How many clips took the last step, and when that had ended."""

    def finish(self) -> Exception | None:
        """All steps of all clips that stay; or what ended that before."""
        clips = self._lockstep.clips
        for clip in clips:
            clip.resume()
        try:
            self._lockstep.finish()
            self.samples = {self._index[id(clip)]: clip.samples() for clip in clips}
        except Exception as error:
            problem = error.with_traceback(None)
        except BaseException:
            self._keep_all()
            raise
        else:
            for clip in clips:
                clip.delete_checkpoint()
            return None
        self._keep_all()
        self._take_out_cancelled()
        return problem

    def states(self) -> dict[int, LoopState]:
        """Where the clips that stay are."""
        return {self._index[id(clip)]: clip.loop.state.on_host() for clip in self._lockstep.clips}

    def _after_step(self, stepped: Sequence[ClipSampler]) -> None:
        seconds = self._seconds_of(len(stepped))
        self._take_out_cancelled()
        if seconds is None or len(stepped) < len(self._index):
            return
        if not self._pays(seconds) and self._lockstep.behind():
            raise NotWorthBatchingError(f"a step of {len(stepped)} clips took {seconds:.2f} s")

    def _seconds_of(self, clips: int) -> float | None:
        """Of the last step; None of the first of so many clips."""
        if self._run.runtime.device.type == "cuda":
            torch.cuda.current_stream(self._run.runtime.device).synchronize()
        before, now = self._since, time.monotonic()
        self._since = clips, now
        return now - before[1] if before is not None and before[0] == clips else None

    def _take_out_cancelled(self) -> None:
        for clip in list(self._lockstep.clips):
            try:
                clip.clip.check_cancelled()
            except Exception as error:
                clip.save_checkpoint()
                self._lockstep.clips.remove(clip)
                self._left(self._index[id(clip)], error.with_traceback(None))

    def _keep_all(self) -> None:
        for clip in self._lockstep.clips:
            clip.save_checkpoint()
