"""Decode stage: turns latents into frames, which arrive chunk by chunk.

Shape legend: F frames of the clip, f of a chunk, C latent channels, H/W height and width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import BadInputError, PlanMismatchError
from ..families import Family, I2VModel, family_of
from ..memory.device import is_out_of_memory
from ..planning.plan import Plan, Stage
from .run import StageRun, open_stage_run
from .runtime import Runtime, StageReport


class DecodeStream:
    """Iterator over frames while they are decoded, each once and in order. Made by `decode_stream`.

    Yields chunks (f, H, W, 3) in 0…1, fp32, in host memory, which the caller owns; the device holds one chunk at a
    time. The caller's work between chunks is neither measured nor timed. When the device runs out of memory, decoding
    continues from the next frame with smaller tiles.
    """

    def __init__(self, run: StageRun, family: Family, samples: Tensor) -> None:
        self.total_frames = family.decoded_frames(samples)
        self._run, self._family, self._samples = run, family, samples
        self._done = 0
        self._chunks = self._decode()

    def __iter__(self) -> Iterator[Tensor]:
        return self._chunks

    def close(self) -> None:
        """Stop decoding and take everything off the device."""
        self._chunks.close()

    def report(self) -> StageReport:
        return self._run.report()

    def _decode(self) -> Generator[Tensor]:
        while self._done < self.total_frames:
            problem = yield from self._decode_until_out_of_memory()
            if problem is not None:
                self._run.fall_back(problem, f"at frame {self._done} of {self.total_frames}")

    def _decode_until_out_of_memory(self) -> Generator[Tensor, None, str | None]:
        """Yield the frames that are left; return the error's message if the device runs out of memory."""
        run, family = self._run, self._family
        tiling = run.plan.decode.settings.tiling
        run.begin(self._done, self.total_frames)
        try:
            with run.place(family.decoder, by_layer=tiling.by_layer) as decoder:
                for frames_fHWC in family.decode(
                    decoder, self._samples, self._done, tiling, run.runtime.check_cancelled
                ):
                    self._done += len(frames_fHWC)
                    with run.meter.paused():
                        run.runtime.on_frames(frames_fHWC)
                    run.progress(self._done, self.total_frames)
                    with run.meter.paused():
                        yield frames_fHWC
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return str(error)
        return None


@contextmanager
def decode_stream(model: I2VModel, plan: Plan, samples: Tensor, runtime: Runtime) -> Generator[DecodeStream]:
    """Open a stream of frames decoded from the host's LATENT samples. Iterate while the context lasts."""
    family = family_of(model.architecture)
    _check_samples(family, plan, samples)
    with open_stage_run(Stage.DECODE, model, plan, runtime) as run:
        stream = DecodeStream(run, family, samples)
        try:
            yield stream
        finally:
            stream.close()


def decode(model: I2VModel, plan: Plan, samples: Tensor, runtime: Runtime) -> tuple[Tensor, StageReport]:
    """Decode all frames: (F, H, W, 3) in 0…1, fp32, on the CPU."""
    frames_FHWC: Tensor | None = None
    done = 0
    with decode_stream(model, plan, samples, runtime) as stream:
        for chunk_fHWC in stream:
            if frames_FHWC is None:
                frames_FHWC = torch.empty(stream.total_frames, *chunk_fHWC.shape[1:])
            frames_FHWC[done : done + len(chunk_fHWC)] = chunk_fHWC
            done += len(chunk_fHWC)
    assert frames_FHWC is not None
    return frames_FHWC, stream.report()


def _check_samples(family: Family, plan: Plan, samples: Tensor) -> None:
    facts = family.facts
    channels = facts.latent_channels
    if samples.ndim != facts.latent_dimensions or 0 in samples.shape or samples.shape[1] != channels:
        shape = f"(frames, {channels}, " if facts.latent_dimensions == 4 else f"(1, {channels}, latent frames, "
        raise BadInputError(
            f"the latent has shape {tuple(samples.shape)}, but {facts.display_name} decodes {shape}height, width)",
            "connect the LATENT of Chunked Sampler",
        )
    planned = facts.latent_size(plan.request.size)
    if samples.shape[-2:] != (planned.latent_height, planned.latent_width):
        raise PlanMismatchError(
            f"the latent is {samples.shape[-1]}×{samples.shape[-2]}, the plan's is "
            f"{planned.latent_width}×{planned.latent_height} (in latent space)",
            "make the plan for the latent's size",
        )
    if not torch.isfinite(samples).all():
        raise BadInputError("the latent holds values that are NaN or infinite", "sample again in bf16 or fp32")
