"""The order of layers in a 3-D UNet of resolutions, which its kinds share; what a layer is, each kind knows.

Where a model's own forward holds on to all skip connections, whole concatenations and whole upsampled tensors, a walk
gives each tensor up at its last use, and hands every layer to `frames` or `strips`, which cut it as the settings say.

Legend: N batch × frames, C channels, H height, W width (latent).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from . import spatial_layers
from .execution import Execution
from .skips import Skips


class UNetForward(ABC):
    """One forward through a UNet. `hidden` (N, C, H, W) is the only reference to the hidden state between layers.

    `embedding` (N, width) is that of what all layers are told, time among it.
    """

    def __init__(self, execution: Execution, embedding: torch.Tensor, hidden: torch.Tensor) -> None:
        self.hidden = hidden
        self._execution = execution
        self._embedding = embedding
        self._skips = Skips(park=execution.settings.offload_skips)

    @abstractmethod
    def _resnet_of(self, block: Any, index: int) -> Any:
        """The block's `ResnetBlock2D` of this index."""

    @abstractmethod
    def _along_time(self, block: Any, index: int) -> None:
        """What comes after the block's ResNet layer of this index, along time."""

    @abstractmethod
    def _attention(self, block: Any, index: int) -> None:
        """The block's attention layer of this index, over space and over time."""

    def through(self, unet: Any) -> None:
        """All blocks, from the first skip connection on."""
        self._skips.push(self.hidden)
        for block in unet.down_blocks:
            self._down(block)
        self._middle(unet.mid_block)
        upsampler = None
        for block in unet.up_blocks:
            self._up(block, upsampler)
            upsampler = block.upsamplers[0] if block.upsamplers else None

    def _down(self, block: Any) -> None:
        for index in range(len(block.resnets)):
            self._resnet(block, index)
            self._after_resnet(block, index)
            self._skips.push(self.hidden)
        for downsampler in block.downsamplers or ():
            self.hidden = spatial_layers.downsample(self._execution, downsampler, self.hidden)
            self._skips.push(self.hidden)

    def _middle(self, block: Any) -> None:
        self._resnet(block, 0)
        self._along_time(block, 0)
        for index in range(len(block.attentions)):
            self._attention(block, index)
            self._resnet(block, index + 1)
            self._along_time(block, index + 1)

    def _up(self, block: Any, upsampler: Any) -> None:
        """An up-block, with the upsampler of the block before it: that goes into the first layer's chunks."""
        for index in range(len(block.resnets)):
            self.hidden = spatial_layers.resnet(
                self._execution,
                self._resnet_of(block, index),
                self.hidden,
                self._embedding,
                skip=self._skips.pop(),
                upsampler=upsampler if index == 0 else None,
                in_place=not self._skips.hold(self.hidden),
            )
            self._after_resnet(block, index)

    def _resnet(self, block: Any, index: int) -> None:
        in_place = not self._skips.hold(self.hidden)
        resnet = self._resnet_of(block, index)
        self.hidden = spatial_layers.resnet(self._execution, resnet, self.hidden, self._embedding, in_place=in_place)

    def _after_resnet(self, block: Any, index: int) -> None:
        self._along_time(block, index)
        if getattr(block, "has_cross_attention", False):
            self._attention(block, index)
