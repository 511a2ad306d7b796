"""Core's MiniMax H3 in chunks, equal to core's own forward.

One sequence holds text, keyframes or references, audio and video, without a batch axis. Self-attention alone looks at
all tokens, and each of its heads for itself. So attention runs for some heads at a time, and everything else for some
tokens at a time. Core updates the hidden state in place, and so does this.

Shape legend: S tokens of the sequence, D width, h heads of a group, n tokens of a chunk, d width of a head, P numbers
of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from comfy.ldm.minimax import model as core
from torch import nn

from ..calls import CallState
from ..model import Patch
from .block import Block
from .ends import FinalLayer, PatchEmbedding
from .traced import TracedForward, refined_text_shape

_PATCH_LAYERS = ("video_patch_proj", "audio_patch_proj")


class MiniMaxH3:
    """`model.NativeModel` for core's `MiniMaxH3Model`."""

    name = "MiniMax H3"

    def recognises(self, model: nn.Module) -> bool:
        return isinstance(model, core.MiniMaxH3Model)

    def block_lists(self, model: nn.Module) -> tuple[str, ...]:  # noqa: ARG002
        return ("blocks",)

    def patches(self, model: Any, state: CallState) -> Iterator[Patch]:
        """Replacement methods by their path below the model; parts that are not core's own are left out."""
        for index, block in enumerate(model.blocks):
            if type(block) is core.DiTBlock:
                yield Patch(f"blocks.{index}", block, Block(block, state))
        if type(model.final_layer) is core.FinalLayer:
            yield Patch("final_layer", model.final_layer, FinalLayer(model.final_layer, state))
        for path in _PATCH_LAYERS:
            layer = getattr(model, path)
            yield Patch(path, layer, PatchEmbedding(layer, state))
        if model.rope.inv_freq.is_meta:
            yield Patch("", model, TracedForward(model), method="_forward")

    def stand_ins(self, model: Any) -> Mapping[str, Callable[..., Any]]:
        """`model.PreparesConditioning`: H3 has transformers that refine the text."""
        return {"preprocess_text_embeds": partial(refined_text_shape, model.hidden_size)}


MODEL = MiniMaxH3()
