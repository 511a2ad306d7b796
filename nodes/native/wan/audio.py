"""Sound in Wan's models: each frame's tokens attend to that frame's sound, so some frames run at a time."""

from __future__ import annotations

from typing import Any

from comfy.ldm.wan import model as core
from torch import Tensor

from ..calls import CallState
from ..model import is_plain
from .block import Block, keys_and_values
from .modulation import modulation


class AudioBlock(Block):
    """`WanAttentionBlockAudio.forward`, of HuMo: a block with one more cross-attention."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] (core's own signatures)
        self,
        x: Tensor,
        e: Tensor,
        freqs: Tensor,
        context: Tensor,
        context_img_len: int | None = 257,
        audio: Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
    ) -> Tensor:
        if not self._state.chunked:
            return core.WanAttentionBlockAudio.forward(
                self._block, x, e, freqs, context, context_img_len, audio, transformer_options
            )
        hidden = self.own(x, transformer_options)
        rows = modulation(self._block.modulation, e, hidden)
        self.attend(hidden, rows, freqs, context, context_img_len, transformer_options)
        if audio is not None:
            hidden = self._attend_to_audio(hidden, audio, transformer_options)
        self.feed_forward(hidden, rows)
        return hidden

    def _attend_to_audio(self, hidden: Tensor, audio: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        wrapper = self._block.audio_cross_attn_wrapper
        attention, norm = wrapper.audio_cross_attn, wrapper.norm1_audio
        if not (
            is_plain(wrapper, core.AudioCrossAttentionWrapper) and is_plain(attention, core.WanT2VCrossAttentionGather)
        ):
            return wrapper(hidden, audio, transformer_options=transformer_options).contiguous()
        batch, _, width = hidden.shape
        heads = (attention.num_heads, attention.head_dim)
        keys, values = keys_and_values(self._state, audio, attention.k, attention.norm_k, attention.v)
        # Core has 16 tokens of sound a frame.
        keys, values = (it.view(batch, -1, 16, *heads).transpose(2, 3) for it in (keys, values))
        frames_BTnD = hidden.unflatten(1, (keys.shape[1], -1))
        unit_bytes = 5 * batch * frames_BTnD.shape[2] * width * hidden.element_size()
        modules = (attention.q, attention.norm_q, attention.o)
        with self._state.tokens(
            "audio", *modules, norm, total=keys.shape[1], unit_bytes=unit_bytes, multiple=1
        ) as chunks:
            for frames in chunks:
                query = attention.norm_q(attention.q(norm(frames_BTnD[:, frames])))
                query = query.unflatten(3, heads).flatten(0, 1).transpose(1, 2)
                attended = core.optimized_attention(
                    query,
                    keys[:, frames].flatten(0, 1),
                    values[:, frames].flatten(0, 1),
                    heads=attention.num_heads,
                    skip_reshape=True,
                    skip_output_reshape=True,
                    transformer_options=transformer_options,
                )
                del query
                attended = attended.transpose(1, 2).flatten(2).unflatten(0, (batch, -1))
                frames_BTnD[:, frames].add_(attention.o(attended))
                del attended
        return hidden


class AudioInjector:
    """`AudioInjector_WAN.forward`, of S2V and WanDancer, which follows some of the blocks."""

    def __init__(self, injector: Any, state: CallState) -> None:
        self._injector, self._state = injector, state

    def __call__(
        self, x: Tensor, block_id: int, audio_emb: Tensor, audio_emb_global: Tensor | None, seq_len: int, **scale: float
    ) -> Tensor:
        injector = self._injector
        index = injector.injected_block_id.get(block_id)
        attention = None if index is None else injector.injector[index]
        if not self._state.chunked or not is_plain(attention, core.WanT2VCrossAttention):
            return core.AudioInjector_WAN.forward(
                injector, x, block_id, audio_emb, audio_emb_global, seq_len=seq_len, **scale
            )
        assert attention is not None
        batch, _, width = x.shape
        parts = audio_emb.shape[1]
        hidden_BTnD = x[:, :seq_len].unflatten(1, (parts, -1))
        by_sound = injector.enable_adain and injector.adain_mode == "attn_norm"
        norm = (injector.injector_adain_layers if by_sound else injector.injector_pre_norm_feat)[index]
        unit_bytes = 6 * batch * hidden_BTnD.shape[2] * width * x.element_size()
        with self._state.tokens("audio", attention, norm, total=parts, unit_bytes=unit_bytes, multiple=1) as chunks:
            for some in chunks:
                hidden, sound = _one_by_one(hidden_BTnD, some), _one_by_one(audio_emb, some)
                normed = norm(hidden, temb=_one_by_one(audio_emb_global, some)[:, 0]) if by_sound else norm(hidden)
                attended = attention(
                    x=normed,
                    context=sound if sound.ndim == 3 else sound.unsqueeze(1),
                    transformer_options=self._state.attention_options,
                )
                del hidden, normed
                hidden_BTnD[:, some].add_(attended.unflatten(0, (batch, -1)) * scale.get("scale", 1.0))
                del attended
        return x


def _one_by_one(parts: Tensor | None, some: slice) -> Tensor:
    """Some parts (B, T, ...) of each clip as a batch of their own, for attention to keep them apart."""
    assert parts is not None
    return parts[:, some].flatten(0, 1)
