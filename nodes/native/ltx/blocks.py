"""Core's blocks of LTX-Video and of LTX-2.x, a chunk of tokens at a time.

Core's blocks update the hidden state that they are given in place, and so do these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from comfy.ldm.lightricks import av_model
from comfy.ldm.lightricks import model as core
from torch import Tensor

from ..calls import CallState
from .attention import attend, feed_forward, source_of
from .modulated import ModulatedState, adding_to, normed_tokens, tokens_of
from .rotary import Rotary
from .timesteps import TokenTimesteps

# First rows of a layer's shift, scale and gate in a block's table.
_ATTENTION, _FEED_FORWARD, _TEXT = 0, 3, 6
# The same in the table of attention between video and audio, whose scales come first and whose gate lies apart.
_TO_VIDEO, _TO_AUDIO, _CROSS_GATE = 0, 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """The text that a hidden state attends to."""

    context: Tensor
    mask: Tensor | None
    table: Tensor | None
    """Shift and scale of the context; None where core does not modulate it."""
    timestep: Tensor | None

    def modulated(self) -> Tensor:
        """The context (B, L, D), shifted and scaled."""
        if self.table is None or self.timestep is None:
            return self.context
        batch, steps, _ = self.timestep.shape
        table = self.table.to(device=self.context.device, dtype=self.context.dtype)
        shift, scale = (table + self.timestep.reshape(batch, steps, 2, -1)).unbind(2)
        return self.context * (1 + scale) + shift


class VideoBlock:
    """`BasicTransformerBlock.forward`, a chunk of tokens at a time."""

    def __init__(self, block: Any, state: CallState) -> None:
        self._block, self._state = block, state

    def __call__(
        self,
        x: Tensor,
        context: Any = None,
        attention_mask: Tensor | None = None,
        timestep: Any = None,
        pe: Any = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
        self_attention_mask: Any = None,
        prompt_timestep: Tensor | None = None,
    ) -> Tensor:
        block, state, options = self._block, self._state, transformer_options
        if not state.chunked:
            return core.BasicTransformerBlock.forward(
                block, x, context, attention_mask, timestep, pe, options, self_attention_mask, prompt_timestep
            )
        hidden = ModulatedState(x, TokenTimesteps.of(timestep), block.scale_shift_table)
        add = hidden.add_gated(_ATTENTION + 2)
        attend(state, block.attn1, hidden.normed(_ATTENTION, pe), None, add, mask=self_attention_mask, options=options)
        if block.cross_attention_adaln:
            table = block.prompt_scale_shift_table
            queries, add = hidden.normed(_TEXT), hidden.add_gated(_TEXT + 2)
        else:
            table, queries, add = None, tokens_of(x), adding_to(x)
        text = _Text(context=context, mask=attention_mask, table=table, timestep=prompt_timestep)
        source = source_of(state, block.attn2, tokens_of(text.modulated()))
        attend(state, block.attn2, queries, source, add, mask=text.mask, options=options)
        feed_forward(state, block.ff, hidden.normed_fused(_FEED_FORWARD), hidden.add_gated_fused(_FEED_FORWARD + 2))
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """Video or audio in a block that has both."""

    attn1: Any
    attn2: Any
    ff: Any
    state: ModulatedState
    mask: Any
    """Of self-attention."""
    text: _Text
    rotary: Rotary
    cross: ModulatedState
    """The same hidden state with the modulation of attention to the other stream."""
    cross_gate: ModulatedState
    cross_rotary: Rotary


class AVBlock:
    """`BasicAVTransformerBlock.forward`, a chunk of tokens at a time."""

    def __init__(self, block: Any, state: CallState) -> None:
        self._block, self._state = block, state

    def __call__(self, x: tuple[Tensor, Tensor], **given: Any) -> tuple[Tensor, Tensor]:
        if not self._state.chunked:
            return av_model.BasicAVTransformerBlock.forward(self._block, x, **given)
        options: dict[str, Any] = given["transformer_options"]
        hidden, sound = x
        run_video, heard = options.get("run_vx", True), sound.numel() > 0
        run_audio = heard and options.get("run_ax", True)
        video = _stream(self._block, "video", hidden, given)
        audio = _stream(self._block, "audio", sound, given)
        running = [stream for stream, runs in ((video, run_video), (audio, run_audio)) if runs]
        for stream in running:
            self._attend(stream, options)
        self._attend_across(
            video,
            audio,
            options,
            to_video=run_video and heard and options.get("a2v_cross_attn", True),
            to_audio=run_audio and options.get("v2a_cross_attn", True),
        )
        for stream in running:
            tokens, add = stream.state.normed(_FEED_FORWARD), stream.state.add_gated_fused(_FEED_FORWARD + 2)
            feed_forward(self._state, stream.ff, tokens, add)
        return hidden, sound

    def _attend(self, stream: _Stream, options: dict[str, Any]) -> None:
        """Self-attention, and attention to the text."""
        hidden = stream.state
        queries, add = hidden.normed(_ATTENTION, stream.rotary), hidden.add_gated_fused(_ATTENTION + 2)
        attend(self._state, stream.attn1, queries, None, add, mask=stream.mask, options=options)
        if self._block.cross_attention_adaln:
            queries, add = hidden.normed(_TEXT), hidden.add_gated(_TEXT + 2)
        else:
            queries, add = normed_tokens(hidden.hidden), adding_to(hidden.hidden)
        source = source_of(self._state, stream.attn2, tokens_of(stream.text.modulated()))
        attend(self._state, stream.attn2, queries, source, add, mask=stream.text.mask, options=options)

    def _attend_across(
        self, video: _Stream, audio: _Stream, options: dict[str, Any], *, to_video: bool, to_audio: bool
    ) -> None:
        """Attention between the streams, each to the other as it was before."""
        state, block = self._state, self._block

        def tokens(stream: _Stream, first: int) -> Any:
            return stream.cross.normed(first, stream.cross_rotary, scale_first=True)

        to_video_attn, to_audio_attn = block.audio_to_video_attn, block.video_to_audio_attn
        seen = source_of(state, to_audio_attn, tokens(video, _TO_AUDIO)) if to_audio else None
        if to_video:
            heard, add = source_of(state, to_video_attn, tokens(audio, _TO_VIDEO)), video.cross_gate.add_gated_fused(0)
            attend(state, to_video_attn, tokens(video, _TO_VIDEO), heard, add, options=options)
        if to_audio:
            add = audio.cross_gate.add_gated_fused(0)
            attend(state, to_audio_attn, tokens(audio, _TO_AUDIO), seen, add, options=options)


def _stream(block: Any, name: Literal["video", "audio"], hidden: Tensor, given: dict[str, Any]) -> _Stream:
    """A stream of a block's layers and core's arguments, which tell audio from video by their names."""
    is_video, letter = name == "video", name[0]

    def layer(kind: str) -> Any:
        return getattr(block, kind if is_video else f"audio_{kind}", None)

    def steps(kind: str) -> TokenTimesteps:
        return TokenTimesteps.of(given[f"{letter}_{kind}"])

    cross_table = getattr(block, f"scale_shift_table_a2v_ca_{name}")
    return _Stream(
        attn1=layer("attn1"),
        attn2=layer("attn2"),
        ff=layer("ff"),
        state=ModulatedState(hidden, steps("timestep"), layer("scale_shift_table")),
        mask=given.get("self_attention_mask") if is_video else None,
        text=_Text(
            context=given[f"{letter}_context"],
            mask=given.get("attention_mask"),
            table=layer("prompt_scale_shift_table"),
            timestep=given.get(f"{letter}_prompt_timestep"),
        ),
        rotary=given[f"{letter}_pe"],
        cross=ModulatedState(hidden, steps("cross_scale_shift_timestep"), cross_table[:_CROSS_GATE]),
        cross_gate=ModulatedState(hidden, steps("cross_gate_timestep"), cross_table[_CROSS_GATE:]),
        cross_rotary=given[f"{letter}_cross_pe"],
    )
