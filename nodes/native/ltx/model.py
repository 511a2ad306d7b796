"""`model.NativeModel` for core's LTX-Video and LTX-2.x."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from comfy.ldm.lightricks import av_model
from comfy.ldm.lightricks import model as core
from torch import Tensor, nn

from ..calls import CallState
from ..meta_model import on_meta
from ..model import Patch
from .blocks import AVBlock, VideoBlock
from .call_parts import AVOutput, Blocks, GuideMasks, RotaryTables, Timesteps, VideoOutput

BLOCK_LISTS = ("transformer_blocks",)
_BLOCKS = {core.BasicTransformerBlock: VideoBlock, av_model.BasicAVTransformerBlock: AVBlock}
_OUTPUTS = {core.LTXVModel: VideoOutput, av_model.LTXAVModel: AVOutput}


class LTX:
    """Every core model of Lightricks' classes; the parts around the blocks are replaced in core's own models alone."""

    name = "LTX"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.LTXVModel)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        return BLOCK_LISTS

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        for index, block in enumerate(model.transformer_blocks):
            if type(block) in _BLOCKS:
                yield Patch(f"transformer_blocks.{index}", block, _BLOCKS[type(block)](block, state))
        if type(model) in _OUTPUTS:
            for part in (Timesteps, RotaryTables, GuideMasks, Blocks, _OUTPUTS[type(model)]):
                yield Patch("", model, part(model, state), part.name)

    def stand_ins(self, model: Any) -> Mapping[str, Callable[..., Any]]:
        """`model.PreparesConditioning`: LTX-2 has transformers that finish the text's embedding."""
        if not hasattr(model, "preprocess_text_embeds"):
            return {}
        shapes: Any = on_meta(model, BLOCK_LISTS)
        for connector in (shapes.video_embeddings_connector, shapes.audio_embeddings_connector):
            connector.transformer_1d_blocks = nn.ModuleList()  # none of them changes the shape

        def preprocess_text_embeds(context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = shapes.preprocess_text_embeds(context.to("meta"), *args, **kwargs)
            return context.new_zeros(result.shape)

        return {"preprocess_text_embeds": preprocess_text_embeds}
