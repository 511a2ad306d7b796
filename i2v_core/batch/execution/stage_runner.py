"""The stages of a job in hand, each admitted by its device's desk, run by the pack's own stages, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
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
from .model_cache import replicate
from .running_job import RunningJob
from .video_writer import AsyncVideoWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRunner:
    """Runs stages on one device. `spanned` is told of each that has ended; nothing of it stays on the device."""

    device: BatchDevice
    desk: AdmissionController
    checkpointing: Checkpointing
    memory_wait_seconds: float
    spanned: Callable[[Span], None]

    def encode(self, flight: RunningJob, model: I2VModel) -> None:
        """Sets the flight's conditioning; or its samples, where they were kept from a run that was cut short."""
        flight.samples = _kept_samples(flight)
        if flight.samples is not None:
            flight.notes.append("sampled by an earlier run")
            return
        prompt = _prompt(flight)
        with self._running(flight, Stage.ENCODE) as runtime:
            flight.conditioning, report = stages.encode(model, flight.plan, prompt, runtime)
            flight.reports.append(report)

    def sample(self, flight: RunningJob, model: I2VModel) -> None:
        """Sets the flight's samples, and keeps them on disk until the video is there."""
        if flight.samples is not None:
            return
        assert flight.conditioning is not None
        with self._running(flight, Stage.SAMPLE) as runtime:
            samples, report = stages.sample(
                model, flight.plan, flight.conditioning, flight.spec.sampler, runtime, self.checkpointing, flight.state
            )
            flight.reports.append(report)
        self.keep(flight, samples)

    def keep(self, flight: RunningJob, samples: torch.Tensor) -> None:
        """The flight has been sampled; where its samples cannot be kept on disk, it is noted."""
        flight.samples, flight.conditioning, flight.state = samples, None, None
        try:
            save_latent(flight.latents_file, samples, flight.plan)
        except FileError as error:
            flight.notes.append(f"the latents could not be kept: {error.problem}")

    def decode(self, flight: RunningJob, model: I2VModel, writing: AsyncVideoWriter) -> None:
        """Every frame to the file; what is still to be written then goes on by itself."""
        assert flight.samples is not None
        with self._running(flight, Stage.DECODE) as runtime:
            with stages.decode_stream(model, flight.plan, flight.samples, runtime) as stream:
                for frames_FHWC in stream:
                    writing.put(frames_FHWC)
            flight.reports.append(stream.report())
        flight.samples = None
        writing.finish()

    def written(self, flight: RunningJob) -> None:
        """The file is whole: what it took since the last frame was decoded."""
        began = flight.handed_over
        self.span(flight, "write", asked=began, begun=began, ended=time.monotonic())

    def span(self, flight: RunningJob, stage: str, *, asked: float, begun: float, ended: float) -> None:
        self.spanned(Span(job=flight.id, device=self.device.name, stage=stage, asked=asked, begun=begun, ended=ended))

    @contextmanager
    def _running(self, flight: RunningJob, stage: Stage) -> Generator[stages.Runtime]:
        """The device is let to the stage, whose plan fits what is free."""
        asked = time.monotonic()
        admission = self._admitted(flight, stage)
        begun, reports = time.monotonic(), len(flight.reports)
        try:
            with self.device.stage(stage, flight.plan):
                yield self._runtime(flight, stage)
        finally:
            alone = self.desk.leave(admission)
            self.span(flight, stage.value, asked=asked, begun=begun, ended=time.monotonic())
        for report in flight.reports[reports:]:
            self.device.concluded(report, alone=alone)

    def _admitted(self, flight: RunningJob, stage: Stage) -> int:
        """The desk's number. Where other programs hold what the stage needs for too long, its plan is made again.

        Raises:
            RanOutError: what they leave is too little for any plan; they may leave more another time.
        """
        while True:
            try:
                needed = needed_bytes(flight.plan.prediction(stage), flight.plan.device)
                return self.desk.admit(flight.id, stage, needed, flight.check, self.memory_wait_seconds)
            except NoRoomError as error:
                words, room = blocking_text(error.reason), error.room
            try:
                flight.plan = refit(flight.plan, stage, room)
            except (DoesNotFitError, BadInputError) as error:
                raise RanOutError(f"{words}, which no plan fits", "close what holds device memory") from error
            flight.notes.append(f"planned again for {stage.value}: {words}")

    def _runtime(self, flight: RunningJob, stage: Stage) -> stages.Runtime:
        def progressed(done: int, total: int, _: object) -> None:
            flight.progress = (stage.value, done, total)
            if stage is Stage.SAMPLE:
                flight.stepped_at.append(time.monotonic())

        flight.progress = (stage.value, 0, 0)
        return replace(self.runtime(flight.check), on_progress=progressed)

    def runtime(self, check_cancelled: Callable[[], None]) -> stages.Runtime:
        """The device, lent to a stage."""
        return stages.Runtime(
            device=self.device.torch_device,
            attention=self.device.attention,
            check_cancelled=check_cancelled,
            make_room=self.device.make_room,
            free_bytes=self.device.free_bytes,
        )


class ModelReplicas:
    """A lane's own hand on each model that it meets; of those, the last is kept."""

    def __init__(self) -> None:
        self._of: Mapping[int, tuple[I2VModel, I2VModel]] = {}

    def of(self, model: I2VModel) -> I2VModel:
        if id(model) not in self._of:
            self._of = {id(model): (model, replicate(model))}
        return self._of[id(model)][1]


def _prompt(flight: RunningJob) -> Prompt:
    spec = flight.spec
    try:
        opened: Any = Image.open(spec.image)
        with opened as picture:
            upright: Any = ImageOps.exif_transpose(picture)  # as cameras say that it is
            image_13HW = to_tensor(upright.convert("RGB"))
    # Pillow's, of files that were whole when the list was read.
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


def _kept_samples(flight: RunningJob) -> torch.Tensor | None:
    """Of the same job, whose process ended between sampling and the end of the video; None where there are none."""
    if not flight.latents_file.is_file():
        return None
    try:
        samples, facts = load_latent(flight.latents_file)
    except FileError as error:
        flight.notes.append(f"kept latents are of no use: {error.problem}")
        return None
    request = flight.plan.request
    same = facts.size == request.size and facts.fingerprint == request.architecture.fingerprint
    return samples if same and bool(torch.isfinite(samples).all()) else None
