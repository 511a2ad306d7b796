"""Core's HunyuanVideo 1.0 and 1.5 in chunks of tokens, equal to core's own forward.

A double block has a stream of text and one of the image, which attend to each other; a single block has both in one.
Keys and values are made for all tokens, and everything else runs on some tokens at a time. Hidden states are updated
in place, as core's own blocks do it.

Shape legend: B batch, H heads, L tokens (text first), n tokens of a chunk, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from comfy.ldm.flux import layers
from comfy.ldm.hunyuan_video import model as core
from comfy.ldm.modules.diffusionmodules.mmdit import PatchEmbed as CorePatchEmbed
from torch import nn

from ..calls import CallState
from ..model import Patch
from .double_block import DoubleBlock
from .io_layers import LastLayer, PatchEmbedding
from .single_block import SingleBlock


class HunyuanVideo:
    """`model.NativeModel` for every core model that is built as HunyuanVideo."""

    name = "HunyuanVideo"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.HunyuanVideo)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        return ("double_blocks", "single_blocks")

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        """Replacement forwards by their path below the model; parts that are not core's own are left out."""
        for index, block in enumerate(model.double_blocks):
            if type(block) is layers.DoubleStreamBlock:
                yield Patch(f"double_blocks.{index}", block, DoubleBlock(block, state))
        for index, block in enumerate(model.single_blocks):
            if type(block) is layers.SingleStreamBlock:
                yield Patch(f"single_blocks.{index}", block, SingleBlock(block, state))
        if type(model.final_layer) is layers.LastLayer:
            yield Patch("final_layer", model.final_layer, LastLayer(model.final_layer, state))
        if type(model.img_in) is CorePatchEmbed and len(model.patch_size) == 3:
            yield Patch("img_in", model.img_in, PatchEmbedding(model.img_in, state))


MODEL = HunyuanVideo()
