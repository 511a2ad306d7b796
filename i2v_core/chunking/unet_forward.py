"""The order of layers that all 3-D UNets share; subclasses define the layers.

A model's own forward holds all skip connections, concatenations and upsampled tensors at full size. Here each tensor is
freed at its last use, and every layer runs through `spatial_layers` or `temporal_layers`, which chunk it.

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
    """One forward through a UNet's blocks.

    `hidden` (N, C, H, W) is the only reference to the hidden state between layers, so that each layer can free it.

    Example: a UNet whose blocks have spatial layers only.

        class SpatialForward(UNetForward):
            def _resnet_of(self, block, index):
                return block.resnets[index]

            def _temporal_layer(self, block, index):
                pass

            def _attention(self, block, index):
                self.hidden = spatial_layers.transformer(
                    self._execution, block.attentions[index], self.hidden, context, {}
                )

        forward = SpatialForward(execution, embedding, hidden)
        del hidden
        forward.run_blocks(unet)
        prediction = io_layers.out(unet, execution, forward.hidden)
    """

    def __init__(self, execution: Execution, embedding: torch.Tensor, hidden: torch.Tensor) -> None:
        """Start a forward with the embedding (N, width) that all ResNet layers take, and the first hidden state."""
        self.hidden = hidden
        self._execution = execution
        self._embedding = embedding
        self._skips = Skips(offload=execution.settings.offload_skips)

    @abstractmethod
    def _resnet_of(self, block: Any, index: int) -> Any:
        """Return the block's `ResnetBlock2D` of this index."""

    @abstractmethod
    def _temporal_layer(self, block: Any, index: int) -> None:
        """Run the temporal layer that follows the block's ResNet layer of this index."""

    @abstractmethod
    def _attention(self, block: Any, index: int) -> None:
        """Run the block's spatial and temporal attention of this index."""

    def run_blocks(self, unet: Any) -> None:
        """Run all blocks; the first hidden state is the first skip connection."""
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
        self._temporal_layer(block, 0)
        for index in range(len(block.attentions)):
            self._attention(block, index)
            self._resnet(block, index + 1)
            self._temporal_layer(block, index + 1)

    def _up(self, block: Any, upsampler: Any) -> None:
        """Run an up-block. The previous block's upsampler runs inside the first layer's chunks, so it is passed on to
        here.
        """
        for index in range(len(block.resnets)):
            self.hidden = spatial_layers.resnet(
                self._execution,
                self._resnet_of(block, index),
                self.hidden,
                self._embedding,
                skip=self._skips.pop(),
                upsampler=upsampler if index == 0 else None,
                in_place=not self._skips.holds(self.hidden),
            )
            self._after_resnet(block, index)

    def _resnet(self, block: Any, index: int) -> None:
        in_place = not self._skips.holds(self.hidden)
        resnet = self._resnet_of(block, index)
        self.hidden = spatial_layers.resnet(self._execution, resnet, self.hidden, self._embedding, in_place=in_place)

    def _after_resnet(self, block: Any, index: int) -> None:
        self._temporal_layer(block, index)
        if getattr(block, "has_cross_attention", False):
            self._attention(block, index)
