"""Putting chunked execution into a denoiser, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .execution import LayerRunner
from .settings import ChunkSettings


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
def replace_forward(
    denoiser: nn.Module,
    cls: type[nn.Module],
    forward: Callable[[nn.Module, ChunkSettings, Callable[[], None], LayerRunner], Callable[..., Any]],
    settings: ChunkSettings,
    on_chunk: Callable[[], None],
    runner: LayerRunner | None,
) -> Generator[None]:
    """Inside, `denoiser(...)` runs in pieces with the plain forward's result; afterwards it is as before.

    Args:
        denoiser: of the class, in evaluation mode, on one device. Its leaf modules, attention processors included, run
            as they are, with their hooks; hooks on blocks and on the layers that are cut up do not run.
        cls, forward: its class, and what stands in for that's forward.
        on_chunk: called before every piece. What it raises goes through the forward to the caller.
        runner: what surrounds every layer call: placing weights, tracing.

    Raises:
        TypeError: the denoiser is of another class.
        ValueError: it is in training mode.
    """
    if not isinstance(denoiser, cls):
        raise TypeError(f"only {cls.__name__} can be chunked here, got {type(denoiser).__name__}")
    if denoiser.training:
        raise ValueError("chunked execution is for inference: call eval() first")
    with forward_replaced(denoiser, forward(denoiser, settings, on_chunk, runner or LayerRunner())):
        yield
