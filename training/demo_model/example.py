"""The example picture that ships beside the model."""

from __future__ import annotations

import numpy as np
import torch

from training.demo_model.clips import COLOURS, Ground, Sprite
from training.demo_model.scenes import Scene


def example_picture(size: int) -> torch.Tensor:
    """Picture (3, size, size) in [-1, 1]: a red circle, and a blue square out of its way."""
    ground = Ground(
        kind="gradient",
        first=(0.66, 0.64, 0.58),
        second=(0.52, 0.54, 0.56),
        angle=float(np.pi / 3),
        period=0.5,
        phase=0.0,
    )
    circle = Sprite(shape="circle", colour="red", rgb=COLOURS["red"], centre=(0.52, 0.44), radius=0.13)
    square = Sprite(shape="square", colour="blue", rgb=COLOURS["blue"], centre=(0.2, 0.84), radius=0.11)
    return Scene(ground=ground, sprites=(circle, square)).picture(size)
