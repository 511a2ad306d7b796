"""Progress of a stage in ComfyUI: progress bar, animated preview, and text on the running node."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import comfy.model_management as management
import comfy.utils
import torch
from comfy.cli_args import args
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ..i2v_core.stages import StageStatus
from .preview import AnimatedPreview, FinishedFrames
from .tiny_decoder import TinyDecoder

logger = logging.getLogger(__name__)

# Updates come faster than a page can show them, or anybody can read.
_FRAMES_INTERVAL_SECONDS = 0.5
_TEXT_INTERVAL_SECONDS = 0.25
# The preview decoder may take this share of the time at most.
_TINY_DECODER_SHARE = 0.1


class Progress:
    """Progress of one stage.

    Previews show latents, decoded by a tiny decoder or by linear factors, or finished frames.
    """

    def __init__(self, preview_factors: Tensor | None, tiny: TinyDecoder | None, notes: list[str]) -> None:
        self._bar = comfy.utils.ProgressBar(1)
        self._factors, self._tiny, self._notes = preview_factors, tiny, notes
        self._send_text = node_text_sender()
        self._finished = FinishedFrames()
        self._spare_bytes = 0
        self._text_at_seconds = self._frames_at_seconds = self._tiny_again_at_seconds = 0.0

    def add_frames(self, frames_FHWC: Tensor) -> None:
        if wants_previews():
            self._finished.add(frames_FHWC)

    def show(self, status: StageStatus) -> None:
        """Show the status as text on the node, at a limited rate; the first and the last are always shown."""
        self._spare_bytes = status.usable_bytes - status.used_bytes
        now = time.monotonic()
        if 0 < status.done < status.total and now - self._text_at_seconds < _TEXT_INTERVAL_SECONDS:
            return
        self._text_at_seconds = now
        self._send_text(";\n".join([str(status), *self._notes]))

    def update(self, done: int, total: int, latents_BCTHW: Tensor | None) -> None:
        preview = self._preview(latents_BCTHW) if wants_previews() else None
        self._bar.update_absolute(done, total, preview.for_host() if preview else None)

    def _preview(self, latents_BCTHW: Tensor | None) -> AnimatedPreview | None:
        if latents_BCTHW is not None:
            return self._latent_preview(latents_BCTHW)
        if time.monotonic() - self._frames_at_seconds < _FRAMES_INTERVAL_SECONDS:
            return None
        self._frames_at_seconds = time.monotonic()
        return self._finished.preview()

    def _latent_preview(self, latents_BCTHW: Tensor) -> AnimatedPreview | None:
        if self._tiny is not None and self._has_room(self._tiny.needed_bytes(latents_BCTHW), latents_BCTHW.device):
            began = time.monotonic()
            if began < self._tiny_again_at_seconds:
                return None
            try:
                preview = AnimatedPreview(self._tiny.frames(latents_BCTHW))
            except management.InterruptProcessingException:
                raise
            # A failed preview must not end a run; the likeliest cause is running out of memory.
            except Exception as error:
                logger.warning("TAESD previews are off, showing rough ones (%s)", error)
                self._tiny = None
            else:
                ended = time.monotonic()
                self._tiny_again_at_seconds = ended + (ended - began) * (1 / _TINY_DECODER_SHARE - 1)
                return preview
        return None if self._factors is None else AnimatedPreview.of_latents(latents_BCTHW, self._factors)

    def _has_room(self, needed_bytes: int, device: torch.device) -> bool:
        """Return whether both the plan's budget and the device have that much left."""
        return needed_bytes <= min(self._spare_bytes, int(management.get_free_memory(device)))


def wants_previews() -> bool:
    return args.preview_method.value != "none"


def wants_tiny_previews() -> bool:
    """Return whether the user asked for TAESD previews; the host itself treats `auto` as rough ones."""
    return args.preview_method.value == "taesd"


def node_text_sender() -> Callable[[str], None]:
    """Return a function that shows a text on the running node; it does nothing on hosts without that feature."""
    send = getattr(PromptServer.instance, "send_progress_text", None)
    context = get_executing_context()
    if send is None or context is None:
        return lambda text: None  # noqa: ARG005
    return lambda text: send(text, context.node_id, PromptServer.instance.client_id)
