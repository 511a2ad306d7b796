"""Clips that take their steps in the same calls of the denoiser; one alone is the simplest case.

Shape legend: N clips, B batch, C latent channels, T latent frames, H/W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..families import Conditioning, Denoiser, Placed, TensorMap, family_of
from ..placement.attention import attention
from ..sampling.context import in_windows
from ..sampling.loop import Guidance, joined, step_together
from ..sampling.spill import SysmemFallbackDetector
from .clip_sampler import ClipSampler
from .run import StageRun


class BatchedLoop:
    """Clips of one plan, steps and scheduler. Those that have come least far step together until they have caught up.

    `clips` are those that are in it still; what `after_step` raises ends a `finish`, which may be called again.
    `after_step` is told the clips that have stepped.
    """

    def __init__(
        self, run: StageRun, clips: Sequence[ClipSampler], after_step: Callable[[Sequence[ClipSampler]], None]
    ) -> None:
        self.clips = list(clips)
        self._run, self._after_step = run, after_step
        self._family = family_of(run.model.architecture)

    def finish(self) -> None:
        """The steps that are left of all clips, by the run's plan as it is now."""
        while behind := self.behind():
            self._run_with(self._denoiser_of(behind))

    def behind(self) -> list[ClipSampler]:
        """Those whose step is next; none when all are done."""
        left = [it for it in self.clips if it.loop.next_timestep is not None]
        least = min((it.loop.steps_done for it in left), default=0)
        return [it for it in left if it.loop.steps_done == least]

    def _denoiser_of(self, behind: Sequence[ClipSampler]) -> Denoiser:
        """The first that is made for a timestep as high, or the last."""
        timestep = behind[0].loop.next_timestep
        assert timestep is not None
        denoisers = self._family.denoisers(self._run.model.architecture)
        return next((it for it in denoisers if float(timestep) >= it.from_timestep), denoisers[-1])

    def _run_with(self, one: Denoiser) -> None:
        """The steps that are this denoiser's."""
        run, family, chosen = self._run, self._family, self._run.plan.sample.settings
        spill = SysmemFallbackDetector(run.runtime.free_bytes)
        first = self.behind()[0]
        run.begin(first.loop.steps_done, first.clip.settings.steps)
        check_cancelled = run.runtime.check_cancelled
        with (
            run.place(one.component, by_layer=True) as denoiser,
            attention(denoiser.module, run.runtime.attention),
            family.chunked(denoiser.module, chosen.chunk_settings, runner=denoiser.runner, on_chunk=check_cancelled),
        ):
            guidance: Guidance | None = None
            guided: list[ClipSampler] = []
            while (behind := self.behind()) and self._denoiser_of(behind) == one:
                if guidance is None or behind != guided:
                    guidance = None  # the former's inputs first
                    guidance, guided = self._guidance(denoiser, behind), behind
                step_together([it.loop for it in behind], partial(guidance, dtype=denoiser.dtype))
                self._stepped(behind, spill)

    def _stepped(self, clips: Sequence[ClipSampler], spill: SysmemFallbackDetector) -> None:
        step = clips[0].loop.steps_done
        self._run.meter.log_step(step)
        self._after_step(clips)
        spilled = spill.after_step(step)
        if spilled is not None:
            self._run.note(spilled)
            # To a rung lower, as if memory had run out: which it has.
            raise torch.OutOfMemoryError("the driver spills over into host memory")

    def _guidance(self, denoiser: Placed, clips: Sequence[ClipSampler]) -> Guidance:
        def denoise(latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
            return self._family.denoise(denoiser.module, latents_BCTHW, timestep, inputs)

        def placed(inputs: TensorMap) -> TensorMap:
            return {name: tensor.to(denoiser.device, denoiser.dtype, copy=True) for name, tensor in inputs.items()}

        chosen, frames = self._run.plan.sample.settings, clips[0].frames
        context = chosen.context
        told = [it.clip.conditioning for it in clips]
        return Guidance(
            in_windows(denoise, self._family, context, frames) if context else denoise,
            positive=placed(joined([it.positive for it in told])),
            negative=_negative(told, placed),
            scale=self._scale(denoiser, clips),
            batched=chosen.batched_guidance,
        )

    def _scale(self, denoiser: Placed, clips: Sequence[ClipSampler]) -> float | Tensor:
        """That of all, or each clip's own (N, 1, T or 1, 1, 1)."""
        scales = [self._family.guidance_scale(it.clip.settings.cfg, it.frames) for it in clips]
        if len(scales) == 1 and not isinstance(scales[0], Tensor):
            return scales[0]
        rows = [torch.as_tensor(it, dtype=torch.float32).reshape(1, 1, -1, 1, 1) for it in scales]
        return torch.cat(rows).to(denoiser.device)


def _negative(told: Sequence[Conditioning], placed: Callable[[TensorMap], TensorMap]) -> TensorMap | None:
    branches = [it.negative for it in told if it.negative]
    return placed(joined(branches)) if branches else None
