"""A residual block of core's under the names that the pack's tiled layers know."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Resnet:
    """The layers of a residual block, named as in diffusers' `WanResidualBlock`."""

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module
    conv_shortcut: nn.Module
    """An `Identity` where there is none."""
