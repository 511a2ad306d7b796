"""Sample: the denoiser makes the video's latents, step by step."""

from __future__ import annotations

from torch import Tensor

from ..families import Conditioning, I2VModel
from ..planning.plan import Plan, Stage
from ..sampling.checkpoint import Checkpointing
from ..sampling.state import LoopState
from .batched_loop import BatchedLoop
from .clip_sampler import ClipSampler, SampleRequest, SamplerSettings, check_finite
from .run import retry_with_fallback, running
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
    """The video's latents as the host's LATENT samples, fp32, on the CPU.

    With `checkpointing` it goes on from where the same video was when it was cancelled or the program ended; with a
    `state` from there.
    """
    with running(Stage.SAMPLE, model, plan, runtime) as run:
        clip = ClipSampler(run, SampleRequest(conditioning=conditioning, settings=settings, state=state), checkpointing)
        lockstep = BatchedLoop(run, [clip], after_step=lambda _: run.runtime.check_cancelled())

        def finish() -> Tensor:
            lockstep.finish()
            return clip.samples()

        with clip.kept():
            samples = retry_with_fallback(run, finish, where=lambda: clip.where)
    check_finite(run.plan, samples)
    return samples, run.report()
