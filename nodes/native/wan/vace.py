"""VACE: a second line of blocks, for the video that controls the first.

Its first block adds the model's first hidden state to its own, after the model's first block has run. Were that updated
in place, the sum would be another; were it copied, the copy would be held during the whole call. So the sum is taken
before any block runs, where the control video is embedded.
"""

from __future__ import annotations

from typing import Any

from comfy.ldm.wan import model as core
from torch import Tensor

from ..calls import CallState
from .block import Block
from .embedding import PatchEmbedding


class FirstSum:
    """The sum of both lines' first hidden states."""

    def __init__(self, model: Any, state: CallState) -> None:
        self._model, self._state = model, state
        self._first: Tensor | None = None

    def is_taken_early(self) -> bool:
        """Whether all that takes part in it runs the code of this file now, none of it another node's."""
        parts = (
            (self._model.patch_embedding, FirstEmbedding),
            (self._model.vace_patch_embedding, ControlEmbedding),
            (self._model.vace_blocks[0], VaceBlock),
        )
        return all(type(part.__dict__.get("forward")) is kind for part, kind in parts)

    def begin(self, hidden_BThwD: Tensor) -> None:
        """Keep the model's hidden state until the control video is embedded, which core does next."""
        self._first = hidden_BThwD if self.is_taken_early() else None

    def take(self, controls_NThwD: Tensor) -> None:
        """Replace the embedded control videos (N: videos × batch) by the sums."""
        first, self._first = self._first, None
        if first is None:
            return
        first, controls = first.flatten(1, 3), controls_NThwD.flatten(1, 3)
        for video in controls.split(first.shape[0]):
            add_projected(self._model.vace_blocks[0], self._state, video, first)


class FirstEmbedding(PatchEmbedding):
    """The embedding of the model's own latents."""

    def __init__(self, embedding: Any, state: CallState, first_sum: FirstSum) -> None:
        super().__init__(embedding, state, in_fp32=True)
        self._first_sum = first_sum

    def tokens(self, latents_BCTHW: Tensor) -> Tensor:
        hidden = super().tokens(latents_BCTHW)
        self._first_sum.begin(hidden)
        return hidden


class ControlEmbedding(PatchEmbedding):
    """The embedding of the control videos' latents."""

    def __init__(self, embedding: Any, state: CallState, first_sum: FirstSum) -> None:
        super().__init__(embedding, state, in_fp32=True)
        self._first_sum = first_sum

    def tokens(self, latents_BCTHW: Tensor) -> Tensor:
        controls = super().tokens(latents_BCTHW)
        self._first_sum.take(controls)
        return controls


class VaceBlock:
    """`VaceWanAttentionBlock.forward`, a chunk of tokens at a time, in place: core replaces what it hands over."""

    def __init__(self, block: Any, state: CallState, first_sum: FirstSum) -> None:
        self._block, self._state, self._first_sum = block, state, first_sum
        self._attention_block = Block(block, state, may_overwrite=lambda: True)

    def __call__(self, c: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if not self._state.chunked:
            return core.VaceWanAttentionBlock.forward(self._block, c, x, **options)
        hidden = c.contiguous()
        if self._block.block_id == 0 and not self._first_sum.is_taken_early():
            add_projected(self._block, self._state, hidden, x)
        hidden = self._attention_block.run(hidden, **options)
        return self._skip(hidden), hidden

    def _skip(self, hidden: Tensor) -> Tensor:
        skip = hidden.new_empty(hidden.shape)
        batch, total, width = hidden.shape
        unit_bytes = batch * width * hidden.element_size()
        project = self._block.after_proj
        with self._state.tokens("vace_skip", project, total=total, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                skip[:, tokens] = project(hidden[:, tokens])
        return skip


def add_projected(block: Any, state: CallState, control: Tensor, hidden: Tensor) -> None:
    """Replace a control's first hidden state (B, L, D) by its projection plus the model's."""
    batch, total, width = control.shape
    unit_bytes = 2 * batch * width * control.element_size()
    project = block.before_proj
    with state.tokens("vace_first", project, total=total, unit_bytes=unit_bytes) as chunks:
        for tokens in chunks:
            control[:, tokens] = project(control[:, tokens]) + hidden[:, tokens]
