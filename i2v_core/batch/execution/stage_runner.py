"""Running the stages of a job on one device: admitted when they fit, timed, and planned again when memory is short."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image, ImageOps

from ... import stages
from ...errors import BadInputError, DoesNotFitError, FileError, RanOutError
from ...families import I2VModel, Prompt
from ...families.pictures import to_tensor
from ...latent_file import load_latent, save_latent
from ...planning.adjust import refit
from ...planning.margin import needed_bytes
from ...planning.plan import Stage
from ...sampling.checkpoint import Checkpointing
from ..devices.admission import AdmissionController, NoRoomError
from ..devices.device import BatchDevice
from ..monitoring.events import Span
from ..monitoring.messages import blocking_text
from .running_job import RunningJob
from .video_writer import AsyncVideoWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRunner:
    """Runs stages on one device, and leaves nothing of them on it."""

    device: BatchDevice
    admission: AdmissionController
    checkpointing: Checkpointing
    memory_wait_seconds: float
    """How long a stage waits for other programs before it is planned again for less memory."""
    on_span: Callable[[Span], None]
    """Called with the times of each stage that has ended."""

    def encode(self, job: RunningJob, model: I2VModel) -> None:
        """Sets the job's conditioning, or its samples where an earlier run has kept them."""
        job.samples = _kept_samples(job)
        if job.samples is not None:
            job.notes.append("sampled by an earlier run")
            return
        prompt = _prompt(job)
        with self._admitted(job, Stage.ENCODE) as runtime:
            job.conditioning, report = stages.encode(model, job.plan, prompt, runtime)
            job.reports.append(report)

    def sample(self, job: RunningJob, model: I2VModel) -> None:
        """Sets the job's samples, and keeps them on disk until the video is written."""
        if job.samples is not None:
            return
        assert job.conditioning is not None
        with self._admitted(job, Stage.SAMPLE) as runtime:
            samples, report = stages.sample(
                model, job.plan, job.conditioning, job.spec.sampler, runtime, self.checkpointing, job.state
            )
            job.reports.append(report)
        self.set_samples(job, samples)

    def set_samples(self, job: RunningJob, samples: torch.Tensor) -> None:
        """Ends the job's sampling. Samples that cannot be kept on disk only leave a note: the video can do without."""
        job.samples, job.conditioning, job.state = samples, None, None
        try:
            save_latent(job.latents_file, samples, job.plan)
        except FileError as error:
            job.notes.append(f"the latents could not be kept: {error.problem}")

    def decode(self, job: RunningJob, model: I2VModel, writer: AsyncVideoWriter) -> None:
        """Hands every frame to the writer, which may still be writing when this returns."""
        assert job.samples is not None
        with self._admitted(job, Stage.DECODE) as runtime:
            with stages.decode_stream(model, job.plan, job.samples, runtime) as stream:
                for frames_FHWC in stream:
                    writer.put(frames_FHWC)
            job.reports.append(stream.report())
        job.samples = None
        writer.finish()

    def on_written(self, job: RunningJob) -> None:
        """Reports how long writing took after the last frame was decoded."""
        self.report_span(job, "write", asked=job.decoded_at, begun=job.decoded_at, ended=time.monotonic())

    def report_span(self, job: RunningJob, stage: str, *, asked: float, begun: float, ended: float) -> None:
        self.on_span(Span(job=job.id, device=self.device.name, stage=stage, asked=asked, begun=begun, ended=ended))

    @contextmanager
    def _admitted(self, job: RunningJob, stage: Stage) -> Generator[stages.Runtime]:
        """Holds the memory that the stage needs while the context lasts."""
        asked = time.monotonic()
        ticket = self._admit(job, stage)
        begun, reports = time.monotonic(), len(job.reports)
        try:
            with self.device.stage(stage, job.plan):
                yield self._runtime(job, stage)
        finally:
            alone = self.admission.leave(ticket)
            self.report_span(job, stage.value, asked=asked, begun=begun, ended=time.monotonic())
        for report in job.reports[reports:]:
            self.device.concluded(report, alone=alone)

    def _admit(self, job: RunningJob, stage: Stage) -> int:
        """The number of the admission. Plans the stage again when other programs hold what it needs for too long.

        Raises:
            RanOutError: no plan fits what they leave. They may leave more another time.
        """
        while True:
            try:
                needed = needed_bytes(job.plan.prediction(stage), job.plan.device)
                return self.admission.admit(job.id, stage, needed, job.check, self.memory_wait_seconds)
            except NoRoomError as error:
                words, room = blocking_text(error.reason), error.room
            try:
                job.plan = refit(job.plan, stage, room)
            except (DoesNotFitError, BadInputError) as error:
                raise RanOutError(f"{words}, which no plan fits", "close what holds device memory") from error
            job.notes.append(f"planned again for {stage.value}: {words}")

    def _runtime(self, job: RunningJob, stage: Stage) -> stages.Runtime:
        def on_progress(done: int, total: int, _: object) -> None:
            job.progress = (stage.value, done, total)
            if stage is Stage.SAMPLE:
                job.stepped_at.append(time.monotonic())

        job.progress = (stage.value, 0, 0)
        return replace(self.runtime(job.check), on_progress=on_progress)

    def runtime(self, check_cancelled: Callable[[], None]) -> stages.Runtime:
        """The device's services for a stage."""
        return stages.Runtime(
            device=self.device.torch_device,
            attention=self.device.attention,
            check_cancelled=check_cancelled,
            make_room=self.device.make_room,
            free_bytes=self.device.free_bytes,
        )


def _prompt(job: RunningJob) -> Prompt:
    spec = job.spec
    try:
        opened: Any = Image.open(spec.image)
        with opened as picture:
            upright: Any = ImageOps.exif_transpose(picture)  # cameras store the rotation beside the pixels
            image_13HW = to_tensor(upright.convert("RGB"))
    # Pillow raises all of these, for files that were whole when the list was read.
    except (OSError, SyntaxError, ValueError) as error:
        raise BadInputError(f"the picture {spec.image} cannot be read any more: {error}", "put it back") from error
    return Prompt(
        image_FHWC=image_13HW.permute(0, 2, 3, 1),
        text=spec.prompt,
        negative_text=spec.negative,
        fps=max(1, round(spec.fps)),
        motion_bucket=spec.motion_bucket,
        noise_augmentation=spec.noise_augmentation,
    )


def _kept_samples(job: RunningJob) -> torch.Tensor | None:
    """Samples of a run of the same job that ended between sampling and the video; None where there are none."""
    if not job.latents_file.is_file():
        return None
    try:
        samples, facts = load_latent(job.latents_file)
    except FileError as error:
        job.notes.append(f"kept latents are of no use: {error.problem}")
        return None
    request = job.plan.request
    same = facts.size == request.size and facts.fingerprint == request.architecture.fingerprint
    return samples if same and bool(torch.isfinite(samples).all()) else None
