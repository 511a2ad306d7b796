"""Frames for the tests of videos."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

MakeFrames = Callable[..., Tensor]


@pytest.fixture(scope="session")
def make_frames() -> MakeFrames:
    """Return a function that draws a bright square moving over a smooth ground: (F, H, W, 3) in 0…1."""

    def make(frames: int = 8, height: int = 64, width: int = 96) -> Tensor:
        result = torch.empty(frames, height, width, 3)
        result[..., 0] = torch.linspace(0.1, 0.9, width)
        result[..., 1] = torch.linspace(0.8, 0.2, height)[:, None]
        result[..., 2] = 0.3
        for index in range(frames):
            left = 4 + 5 * index
            result[index, 16:40, left : left + 24] = torch.tensor([0.95, 0.75, 0.1])
        return result

    return make
