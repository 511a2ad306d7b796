"""Sample stage: the denoiser turns noise into latents, for one clip or for several in the same calls of the denoiser.

Clips of a batch get the results that they would get alone. Whatever goes wrong, none loses a finished step: the clips
that are left can continue alone from their last step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import I2VError
from ..families import Conditioning, I2VModel
from ..planning.plan import Plan, Stage
from ..sampling.checkpoint import Checkpointing
from ..sampling.state import LoopState
from .batched_loop import BatchedLoop
from .clip_sampler import ClipSampler, SampleRequest, SamplerSettings, check_finite
from .run import StageRun, open_stage_run, retry_with_fallback
from .runtime import Runtime, StageReport


def sample(
    model: I2VModel,
    plan: Plan,
    conditioning: Conditioning,
    settings: SamplerSettings,
    runtime: Runtime,
    checkpointing: Checkpointing | None = None,
    state: LoopState | None = None,
) -> tuple[Tensor, StageReport]:
    """Sample one video: the host's LATENT samples, fp32, on the CPU.

    Args:
        checkpointing: continue from the checkpoint of the same video, if an earlier run was cancelled or killed.
        state: continue from this state instead.
    """
    request = SampleRequest(conditioning=conditioning, settings=settings, state=state)
    with open_stage_run(Stage.SAMPLE, model, plan, runtime) as run:
        clip = ClipSampler(run, request, checkpointing)
        loop = BatchedLoop(run, [clip], after_step=lambda _: run.runtime.check_cancelled())

        def finish() -> Tensor:
            loop.finish()
            return clip.samples()

        with clip.checkpointed():
            samples = retry_with_fallback(run, finish, where=lambda: clip.progress_text)
    check_finite(run.plan, samples)
    return samples, run.report()


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedResult:
    """Result of `sample_batched`. Clips are named by their index in the list of requests."""

    samples: Mapping[int, Tensor]
    """LATENT samples of the clips that are done, as `sample` returns them."""

    states: Mapping[int, LoopState]
    """States of the clips that must continue alone, in host memory."""

    problem: Exception | None
    """The reason why clips must continue alone; None if all are done."""

    report: StageReport


class NotWorthBatchingError(Exception):
    """A batched step takes longer than the clips' steps one after another."""


def sample_batched(
    model: I2VModel,
    plan: Plan,
    requests: Sequence[SampleRequest],
    runtime: Runtime,
    checkpointing: Checkpointing | None,
    is_worthwhile: Callable[[float], bool],
    on_left: Callable[[int, Exception], None],
) -> BatchedResult:
    """Sample clips of one model, size, number of steps and scheduler together.

    Args:
        plan: made for that many clips (`Request.clips`).
        runtime: its `check_cancelled` stands for all clips: if it raises during a step, all of them end.
        is_worthwhile: takes the seconds of a step of all clips, other than the first, which warms up. False ends the
            batch, and the clips continue alone.
        on_left: takes the index of a clip that leaves the batch, and the exception of its own `check_cancelled`, which
            is called after each step. Its checkpoint stays on disk.
    """
    with open_stage_run(Stage.SAMPLE, model, plan, runtime) as run:
        batch = _Batch(run, requests, checkpointing, is_worthwhile, on_left)
        problem = batch.finish()
        states = {} if problem is None else batch.states()
    finite: dict[int, Tensor] = {}
    for index, samples in batch.samples.items():
        try:
            check_finite(plan, samples)
            finite[index] = samples
        except I2VError as error:
            on_left(index, error)
    return BatchedResult(samples=finite, states=states, problem=problem, report=run.report())


class _Batch:
    """Clips that are sampled together. `samples` is filled once all clips that stay are done."""

    def __init__(
        self,
        run: StageRun,
        requests: Sequence[SampleRequest],
        checkpointing: Checkpointing | None,
        is_worthwhile: Callable[[float], bool],
        on_left: Callable[[int, Exception], None],
    ) -> None:
        self._run, self._is_worthwhile, self._on_left = run, is_worthwhile, on_left
        clips = [ClipSampler(run, request, checkpointing) for request in requests]
        self.samples: dict[int, Tensor] = {}
        self._index = {id(clip): index for index, clip in enumerate(clips)}
        self._loop = BatchedLoop(run, clips, self._after_step)
        self._last_step: tuple[int, float] | None = None
        """Number of clips in the last step, and the time when it ended."""

    def finish(self) -> Exception | None:
        """Take all steps of all clips that stay; return the error that ended the batch early, if any."""
        clips = self._loop.clips
        for clip in clips:
            clip.resume()
        try:
            self._loop.finish()
            self.samples = {self._index[id(clip)]: clip.samples() for clip in clips}
        except Exception as error:
            # The traceback would keep the failed layer's tensors on the device.
            problem = error.with_traceback(None)
        except BaseException:
            self._save_checkpoints()
            raise
        else:
            for clip in clips:
                clip.delete_checkpoint()
            return None
        self._save_checkpoints()
        self._remove_cancelled()
        return problem

    def states(self) -> dict[int, LoopState]:
        """Return the states of the clips that stay."""
        return {self._index[id(clip)]: clip.loop.state.on_host() for clip in self._loop.clips}

    def _after_step(self, stepped: Sequence[ClipSampler]) -> None:
        seconds = self._step_seconds(len(stepped))
        self._remove_cancelled()
        if seconds is None or len(stepped) < len(self._index):
            return
        if not self._is_worthwhile(seconds) and self._loop.furthest_behind():
            raise NotWorthBatchingError(f"a step of {len(stepped)} clips took {seconds:.2f} s")

    def _step_seconds(self, clips: int) -> float | None:
        """Return the seconds of the step that just ended; None after the first step of that many clips."""
        if self._run.runtime.device.type == "cuda":
            torch.cuda.current_stream(self._run.runtime.device).synchronize()
        before, now = self._last_step, time.monotonic()
        self._last_step = clips, now
        return now - before[1] if before is not None and before[0] == clips else None

    def _remove_cancelled(self) -> None:
        for clip in list(self._loop.clips):
            try:
                clip.request.check_cancelled()
            except Exception as error:
                clip.save_checkpoint()
                self._loop.clips.remove(clip)
                self._on_left(self._index[id(clip)], error.with_traceback(None))

    def _save_checkpoints(self) -> None:
        for clip in self._loop.clips:
            clip.save_checkpoint()
