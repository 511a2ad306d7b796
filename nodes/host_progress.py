"""The adapter's part for who waits: the progress bar, the animated preview, and words on the node that runs."""

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

# Frames come faster than a page can show animations of them, or anybody can read.
_FRAMES_SHOWN_EVERY_SECONDS = 0.5
_WORDS_EVERY_SECONDS = 0.25
# A decoder for previews takes no more than this share of the time.
_TINY_SHARE = 0.1


class Progress:
    """Of one stage. Previews are of latents, by a tiny decoder or by factors, or of frames that are done."""

    def __init__(self, preview_factors: Tensor | None, tiny: TinyDecoder | None, notes: list[str]) -> None:
        self._bar = comfy.utils.ProgressBar(1)
        self._factors, self._tiny, self._notes = preview_factors, tiny, notes
        self._say = words_on_the_node()
        self._finished = FinishedFrames()
        self._spare_bytes = 0
        self._said_seconds = self._shown_seconds = self._tiny_again_seconds = 0.0

    def add_frames(self, frames_FHWC: Tensor) -> None:
        if wants_previews():
            self._finished.add(frames_FHWC)

    def show(self, status: StageStatus) -> None:
        """In words on the node; fewer than come, but the first and the last, and what has just happened."""
        self._spare_bytes = status.usable_bytes - status.used_bytes
        now = time.monotonic()
        if 0 < status.done < status.total and now - self._said_seconds < _WORDS_EVERY_SECONDS:
            return
        self._said_seconds = now
        self._say(";\n".join([str(status), *self._notes]))

    def update(self, done: int, total: int, latents_BCTHW: Tensor | None) -> None:
        preview = self._preview(latents_BCTHW) if wants_previews() else None
        self._bar.update_absolute(done, total, preview.for_host() if preview else None)

    def _preview(self, latents_BCTHW: Tensor | None) -> AnimatedPreview | None:
        if latents_BCTHW is not None:
            return self._of_latents(latents_BCTHW)
        if time.monotonic() - self._shown_seconds < _FRAMES_SHOWN_EVERY_SECONDS:
            return None
        self._shown_seconds = time.monotonic()
        return self._finished.preview()

    def _of_latents(self, latents_BCTHW: Tensor) -> AnimatedPreview | None:
        if self._tiny is not None and self._has_room(self._tiny.needed_bytes(latents_BCTHW), latents_BCTHW.device):
            began = time.monotonic()
            if began < self._tiny_again_seconds:
                return None
            try:
                preview = AnimatedPreview(self._tiny.frames(latents_BCTHW))
            except management.InterruptProcessingException:
                raise
            # A preview must not end a run; memory that ran out is the likeliest.
            except Exception as error:
                logger.warning("no previews by TAESD any more, rough ones are shown (%s)", error)
                self._tiny = None
            else:
                ended = time.monotonic()
                self._tiny_again_seconds = ended + (ended - began) * (1 / _TINY_SHARE - 1)
                return preview
        return None if self._factors is None else AnimatedPreview.of_latents(latents_BCTHW, self._factors)

    def _has_room(self, needed_bytes: int, device: torch.device) -> bool:
        """Within what the plan may use, and in fact."""
        return needed_bytes <= min(self._spare_bytes, int(management.get_free_memory(device)))


def wants_previews() -> bool:
    return args.preview_method.value != "none"


def wants_tiny_previews() -> bool:
    """The host itself takes `auto` for rough previews."""
    return args.preview_method.value == "taesd"


def words_on_the_node() -> Callable[[str], None]:
    """Shows a text on the node that runs now; does nothing in hosts that have no such thing."""
    send = getattr(PromptServer.instance, "send_progress_text", None)
    context = get_executing_context()
    if send is None or context is None:
        return lambda text: None  # noqa: ARG005
    return lambda text: send(text, context.node_id, PromptServer.instance.client_id)
