"""Parts of a call of core's LTX models around its blocks: what is made before the first, and the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.ldm.lightricks import model as core
from torch import Tensor, nn

from ..call_shapes import DISTINCT_TIMESTEPS
from ..calls import CallState
from ..model import is_own_method, is_plain
from .blocks import AVBlock, VideoBlock
from .guide_mask import as_core_makes_it, guide_mask
from .rotary import TableOnDemand, on_demand, whole_table
from .timesteps import TokenTimesteps, distinct


class _Method:
    """A method of core's model."""

    name: str

    def __init__(self, model: Any, state: CallState) -> None:
        self._model, self._state = model, state

    @property
    def _stock(self) -> Callable[..., Any]:
        return getattr(type(self._model), self.name).__get__(self._model)

    def _is_among_ours(self, options: dict[str, Any]) -> bool:
        """Whether nobody but the parts of this package sees what this one makes: it need not have core's form."""
        model = self._model
        return (
            self._state.chunked
            and all(isinstance(model.__dict__.get(part.name), part) for part in (Blocks, VideoOutput))
            and all(isinstance(it.__dict__.get("forward"), (VideoBlock, AVBlock)) for it in model.transformer_blocks)
            and not options.get("patches_replace", {}).get("dit")
        )


class Timesteps(_Method):
    """`_prepare_timestep`, which embeds the time step of every token: here each distinct time step once."""

    name = "_prepare_timestep"

    def __call__(self, timestep: Tensor, batch_size: int, hidden_dtype: Any, **kwargs: Any) -> Any:
        if timestep.ndim < 2 or not self._is_among_ours(kwargs):
            return self._stock(timestep, batch_size, hidden_dtype, **kwargs)
        selected: Tensor | None = kwargs.get("grid_mask")
        if selected is not None:
            timestep = timestep[:, selected]
        steps, places = distinct(timestep, kwargs.get(DISTINCT_TIMESTEPS))
        # Without the clip's shape core takes them as they are, and looks for no frames among them.
        kwargs = {**kwargs, "grid_mask": None, "orig_shape": None}
        embedded, for_output, prompt = self._stock(steps, batch_size, hidden_dtype, **kwargs)

        def placed(rows: Any) -> TokenTimesteps:
            return TokenTimesteps(rows if isinstance(rows, Tensor) else rows.data, places)

        if isinstance(embedded, Tensor):
            return placed(embedded), placed(for_output), prompt
        video, audio, (audio_scale, video_scale, to_video, to_audio), *prompts = embedded
        cross = [audio_scale, placed(video_scale), placed(to_video), to_audio]
        return [placed(video), audio, cross, *prompts], [placed(for_output[0]), for_output[1]], prompt


class RotaryTables(_Method):
    """`_prepare_positional_embeddings`; tables that are larger than a layer's workspace are made on demand."""

    name = "_prepare_positional_embeddings"

    def __call__(self, pixel_coords: Any, *args: Any) -> Any:
        ours = self._is_among_ours({}) and is_own_method(self._model, "_precompute_freqs_cis")
        if not ours:
            return self._stock(pixel_coords, *args)
        workspace_bytes = self._state.workspace_bytes
        assert workspace_bytes is not None

        def kept(tables: Any) -> Any:
            if isinstance(tables, TableOnDemand):
                return tables if tables.table_bytes > workspace_bytes else tables.whole()
            return type(tables)(map(kept, tables))

        return kept(on_demand(self._model, pixel_coords, *args))


class GuideMasks(_Method):
    """`_build_guide_self_attention_mask`; masks are made for a chunk of queries."""

    name = "_build_guide_self_attention_mask"

    def __call__(self, x: Any, transformer_options: dict[str, Any], merged_args: dict[str, Any]) -> Any:
        hidden: Tensor = x[0] if isinstance(x, list) else x
        ours = self._is_among_ours(transformer_options) and all(
            is_plain(it.attn1, core.CrossAttention) for it in self._model.transformer_blocks
        )
        if not ours and not hidden.is_meta:
            return self._stock(x, transformer_options, merged_args)
        mask = guide_mask(self._model, hidden, merged_args)
        return mask if ours or mask is None else as_core_makes_it(mask)


class Blocks(_Method):
    """`_process_transformer_blocks`, which hands core's tables to blocks that others replace."""

    name = "_process_transformer_blocks"

    def __call__(
        self,
        x: Any,
        context: Any,
        attention_mask: Any,
        timestep: Any,
        pe: Any,
        transformer_options: dict[str, Any] = {},  # noqa: B006 (core's own signature)
        **kwargs: Any,
    ) -> Any:
        def whole(tables: Any) -> Any:
            if isinstance(tables, list):
                return [tuple(map(whole, it)) for it in tables]
            return whole_table(tables)

        if not self._is_among_ours(transformer_options):
            pe = whole(pe)
        return self._stock(x, context, attention_mask, timestep, pe, transformer_options=transformer_options, **kwargs)


class VideoOutput(_Method):
    """`LTXVModel._process_output`, a chunk of tokens at a time."""

    name = "_process_output"

    def __call__(self, x: Any, embedded_timestep: Any, keyframe_idxs: Any, **kwargs: Any) -> Any:
        if not self._state.chunked:
            return self._stock(x, embedded_timestep, keyframe_idxs, **kwargs)
        return self._video(x, embedded_timestep, kwargs)

    def _video(self, hidden: Tensor, embedded: Any, kwargs: dict[str, Any]) -> Tensor:
        """The latent (B, C, T, h, w) of the hidden state."""
        model = self._model
        rows = self._projected(hidden, embedded, model.scale_shift_table, model.norm_out, model.proj_out)
        selected: Tensor | None = kwargs.get("grid_mask")
        if selected is not None:
            every = rows.new_zeros(kwargs["orig_patchified_shape"])
            every[:, selected] = rows
            rows = every
        _, channels, frames, height, width = kwargs["orig_shape"]
        return model.patchifier.unpatchify(
            latents=rows,
            output_height=height,
            output_width=width,
            output_num_frames=frames,
            out_channels=channels,  # patches of one latent pixel
        )

    def _projected(self, hidden: Tensor, embedded: Any, table: Tensor, norm: nn.Module, project: Any) -> Tensor:
        """Tokens of the output (B, L, C)."""
        modulation = TokenTimesteps.of(embedded).shared_modulation(table)
        batch, total, width = hidden.shape
        out = hidden.new_empty(batch, total, project.out_features)
        unit_bytes = 5 * batch * width * hidden.element_size()
        with self._state.tokens("output", norm, project, total=total, unit_bytes=unit_bytes) as chunks:
            for chunk in chunks:
                shift, scale = modulation(chunk)
                out[:, chunk] = project(norm(hidden[:, chunk]).mul_(1 + scale).add_(shift))
                del shift, scale
        return out


class AVOutput(VideoOutput):
    """`LTXAVModel._process_output`, a chunk of tokens at a time."""

    def __call__(self, x: Any, embedded_timestep: Any, keyframe_idxs: Any, **kwargs: Any) -> Any:
        if not self._state.chunked:
            return self._stock(x, embedded_timestep, keyframe_idxs, **kwargs)
        (hidden, sound), (video_steps, audio_steps) = x, embedded_timestep
        video = self._video(hidden, video_steps, kwargs)
        if sound.numel() == 0:
            return video
        return self._model.recombine_audio_and_video_latents(video, self._audio(sound, audio_steps, kwargs))

    def _audio(self, sound: Tensor, embedded: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The latent (B, C, T, bins) of the audio's hidden state; tokens of reference audio, which come first, go."""
        model, reference = self._model, kwargs.get("ref_audio_seq_len", 0)
        if embedded.shape[1] > 1:
            embedded = embedded[:, reference:]
        rows = self._projected(
            sound[:, reference:], embedded, model.audio_scale_shift_table, model.audio_norm_out, model.audio_proj_out
        )
        return model.a_patchifier.unpatchify(rows, channels=model.num_audio_channels, freq=model.audio_frequency_bins)
