"""Replacing a denoiser's forward by a chunked one, and restoring it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .execution import LayerRunner
from .settings import ChunkSettings


def nothing() -> None:
    """Do nothing: the default `on_chunk`."""


@contextmanager
def forward_replaced(denoiser: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Make `denoiser(...)` run `forward` within the context, and restore it afterwards."""
    before = denoiser.__dict__.get("forward")
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        if before is not None:
            denoiser.forward = before


@contextmanager
def replace_forward(
    denoiser: nn.Module,
    cls: type[nn.Module],
    forward: Callable[[nn.Module, ChunkSettings, Callable[[], None], LayerRunner], Callable[..., Any]],
    settings: ChunkSettings,
    on_chunk: Callable[[], None],
    runner: LayerRunner | None,
) -> Generator[None]:
    """Make `denoiser(...)` run chunked within the context, with the result of its own forward, and restore it
    afterwards.

    Args:
        denoiser: a model of class `cls` in evaluation mode, on one device. Its leaf modules and attention processors
            run as they are, with their hooks; hooks on blocks and on layers that are chunked do not run.
        cls: the class that `forward` is a replacement for.
        forward: makes the replacement forward, such as a subclass of `execution.ChunkedForwardBase`.
        settings: how finely layers are chunked.
        on_chunk: called before every chunk. An exception that it raises passes through the forward to the caller.
        runner: runs every layer call, to place weights or to trace memory; None: a plain `LayerRunner`.

    Raises:
        TypeError: the denoiser is of another class.
        ValueError: the denoiser is in training mode.

    Example: a forward of one convolution over chunks of frames.

        class ChunkedConvForward(ChunkedForwardBase):
            def __call__(self, frames):
                execution, model = self._execution(num_frames=len(frames)), self._model
                unit_bytes = frames[0].nbytes
                with execution.layer("conv", model, unit="frame", total=len(frames), unit_bytes=unit_bytes) as call:
                    return execution.over_frames(call, lambda chunk: model(frames[chunk]), frames, frames.shape[1:])

        with replace_forward(conv, nn.Conv2d, ChunkedConvForward, settings, nothing, runner=None):
            conv(frames)
    """
    if not isinstance(denoiser, cls):
        raise TypeError(f"only {cls.__name__} can be chunked here, got {type(denoiser).__name__}")
    if denoiser.training:
        raise ValueError("chunked execution is for inference: call eval() first")
    with forward_replaced(denoiser, forward(denoiser, settings, on_chunk, runner or LayerRunner())):
        yield
