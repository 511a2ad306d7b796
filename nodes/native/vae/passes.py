"""Decode and encode of one VAE: planned, told to core, kept within the plan, and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import comfy.model_management as management
import comfy.utils
import torch

from ....i2v_core.errors import DoesNotFitError, RanOutError
from ....i2v_core.memory.device import is_out_of_memory
from ....i2v_core.units import format_gib
from ..measured import RunMeter
from ..services import Services
from .bands import CANDIDATES, BandedPass, BandRunner, Bands
from .model import NativeVAE, Video
from .plan import Peak, VAEPlan, lowest_needed_bytes, plan_of, plan_pass
from .twin import VAETwin

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A decode or encode of one clip."""

    verb: str
    size: str
    """As the user knows it."""
    peak: Peak
    latent_frames: int
    output_bytes: int
    """Bytes of the result on the device; 0 where it goes to host memory."""
    plainly: Callable[[], None]
    """Runs in core's own code."""
    in_bands: Callable[[BandedPass], None]


class VAEPasses:
    """The passes of one VAE."""

    def __init__(self, native: NativeVAE, vae: Any, services: Services) -> None:
        self._native, self._model, self._services = native, vae.first_stage_model, services
        self._dtype: torch.dtype = vae.vae_dtype
        self.plan: VAEPlan | None = None
        """Plan of the last pass."""
        self.notes: list[str] = []
        """What happened in the last pass that was not planned."""

    def check_latent(self, vae: Any, latent_shape: Sequence[int]) -> None:
        """Raise `DoesNotFitError` if a latent cannot be decoded in what is usable."""
        if len(latent_shape) == 5 and latent_shape[1] == vae.latent_channels:
            pixels = torch.empty(self._pixel_shape(vae, latent_shape), device="meta")
            self._check(self._decoding(vae, torch.empty(tuple(latent_shape), device="meta")[:1], pixels[:1]))

    def decode(self, vae: Any, samples: torch.Tensor) -> torch.Tensor:
        """Pixels (B, C, F, H, W), as core's `VAE.decode` has them before it moves the channels."""
        shape = self._pixel_shape(vae, samples.shape)
        pixels = torch.empty(shape, device=vae.output_device, dtype=vae.vae_output_dtype())
        for item in range(len(samples)):
            self._run(vae, self._decoding(vae, samples[item : item + 1], pixels[item : item + 1]))
            vae.process_output(pixels[item : item + 1])
        return pixels

    def encode(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The latent (B, C, T, h, w) of pixels (B, C, F, H, W)."""
        latents = [self._encoded(vae, pixels[item : item + 1]) for item in range(len(pixels))]
        return torch.cat(latents)

    def _pixel_shape(self, vae: Any, latent_shape: Sequence[int]) -> tuple[int, ...]:
        batch, _, latent_frames, height, width = latent_shape
        _, down, across = vae.upscale_ratio
        channels = self._native.pixel_channels(self._model)
        return (batch, channels, self._native.frames(latent_frames), down * height, across * width)

    def _decoding(self, vae: Any, latent_1CThw: torch.Tensor, pixels_1CFHW: torch.Tensor) -> _Task:
        model, native = self._model, self._native

        def plainly() -> None:
            pixels_1CFHW.copy_(model.decode(latent_1CThw.to(vae.device, vae.vae_dtype)))

        def write(frames: slice, rows: slice, tile_CFrW: torch.Tensor) -> None:
            pixels_1CFHW[0, :, frames, rows].copy_(tile_CFrW)

        return _Task(
            verb="decoding",
            size=_size(pixels_1CFHW.shape),
            peak=partial(self._twin.decode_bytes, tuple(latent_1CThw.shape)),
            latent_frames=latent_1CThw.shape[2],
            output_bytes=pixels_1CFHW.nbytes if pixels_1CFHW.device == vae.device else 0,
            plainly=plainly,
            in_bands=lambda banded: native.decode(model, latent_1CThw, banded, write),
        )

    def _encoded(self, vae: Any, pixels_1CFHW: torch.Tensor) -> torch.Tensor:
        model, native = self._model, self._native
        results: list[torch.Tensor] = []

        def keep(latent: torch.Tensor) -> None:
            results[:] = [latent.to(vae.output_device).to(vae.vae_output_dtype())]

        def read(frames: slice) -> torch.Tensor:
            return vae.process_input(pixels_1CFHW[:, :, frames]).to(vae.vae_dtype).to(vae.device)

        _, _, count, height, width = pixels_1CFHW.shape
        video = Video(frames=count, height=height, width=width, read=read)
        task = _Task(
            verb="encoding",
            size=_size(pixels_1CFHW.shape),
            peak=partial(self._twin.encode_bytes, tuple(pixels_1CFHW.shape)),
            latent_frames=native.latent_frames(count),
            output_bytes=0,
            plainly=lambda: keep(model.encode(read(slice(None)))),
            in_bands=lambda banded: keep(native.encode(model, video, banded)),
        )
        self._run(vae, task)
        return results[0]

    # Planning.

    @cached_property
    def _twin(self) -> VAETwin:
        return VAETwin(self._native, self._model, self._dtype)

    @cached_property
    def _weights_bytes(self) -> int:
        return sum(it.nbytes for it in self._model.parameters())

    @cached_property
    def _held_bytes(self) -> int:
        """Weights of the widest layer call, in the precision of computation."""
        return self._dtype.itemsize * max(it.numel() for it in self._model.parameters())

    def _planned(self, task: _Task) -> VAEPlan:
        usable_bytes = self._services.usable_bytes() - task.output_bytes
        plan = plan_pass(
            task.peak, usable_bytes=usable_bytes, weights_bytes=self._weights_bytes, held_bytes=self._held_bytes
        )
        if plan is None:
            raise self._does_not_fit(task, usable_bytes)
        return plan

    def _check(self, task: _Task) -> None:
        usable_bytes = self._services.usable_bytes() - task.output_bytes
        if lowest_needed_bytes(task.peak) + self._held_bytes > usable_bytes:
            raise self._does_not_fit(task, usable_bytes)

    def _does_not_fit(self, task: _Task, usable_bytes: int) -> DoesNotFitError:
        needed_bytes = lowest_needed_bytes(task.peak) + self._held_bytes + task.output_bytes
        return DoesNotFitError(
            f"{task.verb} {task.size} with the {self._native.name} needs {format_gib(needed_bytes)} even with the "
            f"lowest-memory settings, and {format_gib(usable_bytes)} can be used",
            f"use a smaller size, or a budget of {format_gib(needed_bytes)}",
        )

    # Running.

    def _run(self, vae: Any, task: _Task) -> None:
        """Run a task; when it runs out of memory in a way that smaller bands do not cure, run it at lower settings."""
        plan, self.notes = self._planned(task), []
        self._tell(f"{task.verb} {task.size} {plan}")
        meter, peaks = RunMeter(), list[int]()
        with torch.no_grad(), _on_device(vae.device):
            while True:
                self.plan = plan
                management.load_models_gpu(
                    [vae.patcher], memory_required=plan.needed_bytes, force_full_load=vae.disable_offload
                )
                with meter.around(vae.device, lambda peak_bytes, _: peaks.append(peak_bytes)):
                    problem = self._out_of_memory_in(vae, task, plan.bands)
                if problem is None:
                    break
                plan = self._lower(task, plan, problem)
        measured = f", measured {format_gib(max(peaks))}" if peaks else ""
        done = f"{task.verb} {task.size}: done, predicted {format_gib(plan.peak_bytes)} beside the weights{measured}"
        self._tell("\n".join([done, str(plan), *self.notes]))

    def _out_of_memory_in(self, vae: Any, task: _Task, bands: Bands | None) -> str | None:
        """Run a task; returns the message where the device runs out of memory."""
        try:
            self._services.check_cancelled()
            if bands is None:
                task.plainly()
            else:
                task.in_bands(self._banded(vae, task, bands))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return str(error)
        return None

    def _banded(self, vae: Any, task: _Task, bands: Bands) -> BandedPass:
        progress = comfy.utils.ProgressBar(task.latent_frames)

        def on_full(problem: str) -> None:
            management.soft_empty_cache()
            logger.info("VRAM Fit: %s", problem)
            self._note("ran out of memory: goes on from the same rows, with less on the device")

        runner = BandRunner(vae.device, vae.vae_dtype, on_full)
        return BandedPass(
            device=vae.device,
            dtype=vae.vae_dtype,
            bands=bands,
            runner=runner,
            on_band=self._services.check_cancelled,
            on_full=on_full,
            on_maps=runner.maps.append,
            on_latent_frame=lambda: progress.update(1),
        )

    def _lower(self, task: _Task, plan: VAEPlan, problem: str) -> VAEPlan:
        """The next plan that takes less."""
        candidates = range(plan.candidate + 1, len(CANDIDATES))
        lower = next((it for it in candidates if task.peak(CANDIDATES[it]) < plan.peak_bytes), None)
        if lower is None:
            raise RanOutError(
                f"the device ran out of memory while {task.verb} {task.size} with the {self._native.name}, even with "
                f"the lowest-memory settings ({problem})",
                "free device memory, or use a smaller size",
            )
        management.soft_empty_cache()
        made = plan_of(lower, task.peak, usable_bytes=plan.usable_bytes, weights_bytes=plan.weights_bytes)
        self._note(f"ran out of memory: again in {made.bands} ({problem})")
        return made

    def _note(self, line: str) -> None:
        if line not in self.notes:
            logger.warning("%s: %s", self._native.name, line)
            self.notes.append(line)

    def _tell(self, line: str) -> None:
        logger.info("VRAM Fit, %s: %s", self._native.name, line)
        self._services.say(line)


def _size(pixel_shape: Sequence[int]) -> str:
    _, _, frames, height, width = pixel_shape
    return f"{width}×{height}×{frames}"


def _on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Core's context that makes a CUDA device the current one; older versions have none."""
    context: Any = getattr(management, "cuda_device_context", None)
    return nullcontext() if context is None else context(device)
