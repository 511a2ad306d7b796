"""Putting chunked execution into a denoiser, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .execution import LayerRunner
from .settings import ChunkSettings
from .unet3d import ChunkedForward


def nothing() -> None:
    """An `on_chunk` that does nothing."""


@contextmanager
def forward_replaced(denoiser: nn.Module, forward: Callable[..., Any]) -> Generator[None]:
    """Inside, `denoiser(...)` runs `forward`; afterwards it is as before."""
    before = denoiser.__dict__.get("forward")
    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward
        if before is not None:
            denoiser.forward = before


@contextmanager
def chunked(
    unet: nn.Module,
    settings: ChunkSettings,
    *,
    on_chunk: Callable[[], None] = nothing,
    runner: LayerRunner | None = None,
) -> Generator[None]:
    """Inside, `unet(...)` runs in chunks, with the plain forward's result up to rounding; afterwards it is as before.

    Args:
        unet: an `I2VGenXLUNet` in evaluation mode, on one device. Its leaf modules, attention processors included,
            run as they are, with their hooks; hooks on blocks and on the layers that are cut up do not run.
        on_chunk: called before every chunk. What it raises goes through the forward to the caller.
        runner: what surrounds every layer call: placing weights, tracing.

    Raises:
        TypeError: the model is not an `I2VGenXLUNet`.
        ValueError: it is in training mode, or uses FreeU, which needs whole concatenations.
    """
    _check(unet)
    with forward_replaced(unet, ChunkedForward(unet, settings, on_chunk, runner or LayerRunner())):
        yield


def _check(unet: nn.Module) -> None:
    from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

    if not isinstance(unet, I2VGenXLUNet):
        raise TypeError(f"only I2VGenXLUNet can be chunked, got {type(unet).__name__}")
    if unet.training:
        raise ValueError("chunked execution is for inference: call unet.eval() first")
    blocks: Any = unet.up_blocks
    if any(getattr(block, name, None) for block in blocks for name in ("s1", "s2", "b1", "b2")):
        raise ValueError("chunked execution does not support FreeU: call unet.disable_freeu() first")
