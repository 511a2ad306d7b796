"""InfiniteTalk and MultiTalk: each frame's tokens attend to that frame's speech, in a patch that core's node sets."""

from __future__ import annotations

import math
from typing import Any

from comfy.ldm.wan.model_multitalk import MultiTalkCrossAttnPatch, SingleStreamMultiAttention
from torch import Tensor

from ..calls import CallState
from ..model import is_plain


def is_one_speakers(patch: Any, hidden: Tensor, transformer_options: dict[str, Any]) -> bool:
    """Whether an attention patch is core's for one speaker, on a clip of its usual shape: frames are apart then."""
    if type(patch) is not MultiTalkCrossAttnPatch or transformer_options.get("block_index") is None:
        return False
    attention = patch.model_patch.model.blocks[transformer_options["block_index"]].audio_cross_attn
    return (
        is_plain(attention, SingleStreamMultiAttention)
        and transformer_options.get("x_ref_attn_map") is None  # tells which speaker a token belongs to
        and hidden.shape[0] == 1
        and hidden.shape[1] == math.prod(transformer_options["grid_sizes"])
    )


def add_speech(state: CallState, patch: Any, hidden: Tensor, transformer_options: dict[str, Any]) -> None:
    """`MultiTalkCrossAttnPatch.__call__`, some frames at a time and in place."""
    block = patch.model_patch.model.blocks[transformer_options["block_index"]]
    frames, height, width = transformer_options["grid_sizes"]
    frames_TnD = hidden.unflatten(1, (frames, -1))[0]
    speech = transformer_options["audio_embeds"].to(hidden.dtype)
    modules = (block.norm_x, block.audio_cross_attn)
    unit_bytes = 6 * frames_TnD[0].numel() * hidden.element_size()
    with state.tokens("speech", *modules, total=frames, unit_bytes=unit_bytes, multiple=1) as chunks:
        for some in chunks:
            part = frames_TnD[some].flatten(0, 1).unsqueeze(0)
            shape = (some.stop - some.start, height, width)
            heard = block.audio_cross_attn(block.norm_x(part), speech[:, some], shape=shape, x_ref_attn_map=None)
            part.add_(heard * patch.audio_scale)
            del heard
