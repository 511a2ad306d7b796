"""The denoising loop of one or more clips, whose steps share the calls of the denoiser.

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
from ..sampling.loop import Guidance, joined, step_batch
from ..sampling.sysmem_fallback import SysmemFallbackDetector
from .clip_sampler import ClipSampler
from .run import StageRun


class BatchedLoop:
    """Steps clips of one plan, number of steps and scheduler together; those furthest behind catch up first.

    `clips` are those still in the loop; `after_step` may remove some. It takes the clips that have stepped. An
    exception that it raises ends `finish`, which may be called again.
    """

    def __init__(
        self, run: StageRun, clips: Sequence[ClipSampler], after_step: Callable[[Sequence[ClipSampler]], None]
    ) -> None:
        self.clips = list(clips)
        self._run, self._after_step = run, after_step
        self._family = family_of(run.model.architecture)

    def finish(self) -> None:
        """Take all remaining steps of all clips, under the run's current plan."""
        while clips := self.furthest_behind():
            self._run_with(self._denoiser_for(clips))

    def furthest_behind(self) -> list[ClipSampler]:
        """Return the clips that take the next step; none when all are done."""
        unfinished = [it for it in self.clips if it.loop.next_timestep is not None]
        fewest = min((it.loop.steps_done for it in unfinished), default=0)
        return [it for it in unfinished if it.loop.steps_done == fewest]

    def _denoiser_for(self, clips: Sequence[ClipSampler]) -> Denoiser:
        """Return the model's first denoiser that covers the clips' next timestep, or else its last."""
        timestep = clips[0].loop.next_timestep
        assert timestep is not None
        denoisers = self._family.denoisers(self._run.model.architecture)
        return next((it for it in denoisers if float(timestep) >= it.from_timestep), denoisers[-1])

    def _run_with(self, part: Denoiser) -> None:
        """Place one of the model's denoisers and take steps while the timestep is in its range."""
        run, family, chosen = self._run, self._family, self._run.plan.sample.settings
        detector = SysmemFallbackDetector(run.runtime.free_bytes)
        first = self.furthest_behind()[0]
        run.begin(first.loop.steps_done, first.request.settings.steps)
        check_cancelled = run.runtime.check_cancelled
        with (
            run.place(part.component, by_layer=True) as denoiser,
            attention(denoiser.module, run.runtime.attention),
            family.chunked(denoiser.module, chosen.chunk_settings, runner=denoiser.runner, on_chunk=check_cancelled),
        ):
            guidance: Guidance | None = None
            guided: list[ClipSampler] = []
            while (clips := self.furthest_behind()) and self._denoiser_for(clips) == part:
                if guidance is None or clips != guided:
                    guidance = None  # frees the former clips' inputs before these clips' are copied to the device
                    guidance, guided = self._guidance(denoiser, clips), clips
                step_batch([it.loop for it in clips], partial(guidance, dtype=denoiser.dtype))
                self._finish_step(clips, detector)

    def _finish_step(self, clips: Sequence[ClipSampler], detector: SysmemFallbackDetector) -> None:
        step = clips[0].loop.steps_done
        self._run.meter.log_step(step)
        self._after_step(clips)
        warning = detector.after_step(step)
        if warning is not None:
            self._run.note(warning)
            # Device memory has run out, though no allocation failed: the stage falls back as after an allocation error.
            raise torch.OutOfMemoryError("the driver placed device memory in host memory")

    def _guidance(self, denoiser: Placed, clips: Sequence[ClipSampler]) -> Guidance:
        def denoise(latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
            return self._family.denoise(denoiser.module, latents_BCTHW, timestep, inputs)

        def placed(inputs: TensorMap) -> TensorMap:
            return {name: tensor.to(denoiser.device, denoiser.dtype, copy=True) for name, tensor in inputs.items()}

        chosen, frames = self._run.plan.sample.settings, clips[0].frames
        context = chosen.context
        conditionings = [it.request.conditioning for it in clips]
        return Guidance(
            in_windows(denoise, self._family, context, frames) if context else denoise,
            positive=placed(joined([it.positive for it in conditionings])),
            negative=_negative_inputs(conditionings, placed),
            scale=self._scale(denoiser, clips),
            batched=chosen.batched_guidance,
        )

    def _scale(self, denoiser: Placed, clips: Sequence[ClipSampler]) -> float | Tensor:
        """Return the guidance scale: one float, or one per clip (N, 1, T or 1, 1, 1)."""
        scales = [self._family.guidance_scale(it.request.settings.cfg, it.frames) for it in clips]
        if len(scales) == 1 and not isinstance(scales[0], Tensor):
            return scales[0]
        rows = [torch.as_tensor(it, dtype=torch.float32).reshape(1, 1, -1, 1, 1) for it in scales]
        return torch.cat(rows).to(denoiser.device)


def _negative_inputs(
    conditionings: Sequence[Conditioning], placed: Callable[[TensorMap], TensorMap]
) -> TensorMap | None:
    branches = [it.negative for it in conditionings if it.negative]
    return placed(joined(branches)) if branches else None
