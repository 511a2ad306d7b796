"""Wan's embeddings of latents and camera paths, a latent frame at a time.

Core embeds all frames at once, mostly in fp32, and transposes the result, which takes three times the hidden state.
These write the tokens as the blocks want them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.ldm.wan import model as core
from torch import Tensor

from ..calls import CallState
from ..held_weights import held
from ..model import is_plain
from ..patch_embedding import embedded_by_frame


class PatchEmbedding:
    """A convolution of latents to patches that do not overlap.

    Args:
        in_fp32: whether core computes it in fp32 and casts the result to the precision of the hidden state, which
            is done here for each frame.
    """

    def __init__(self, embedding: Any, state: CallState, *, in_fp32: bool) -> None:
        self._embedding, self._state, self._in_fp32 = embedding, state, in_fp32
        self._core: Callable[[Any, Tensor], Tensor] = type(embedding).forward

    def __call__(self, latents_BCTHW: Tensor) -> Tensor:
        if not self._state.chunked:
            return self._core(self._embedding, latents_BCTHW)
        return self.tokens(latents_BCTHW).permute(0, 4, 1, 2, 3)

    def tokens(self, latents_BCTHW: Tensor) -> Tensor:
        """The embedded patches (B, T, h, w, D), laid out as tokens."""
        with held((self._embedding,), latents_BCTHW.device, latents_BCTHW.dtype):
            return embedded_by_frame(
                lambda frames: self._core(self._embedding, frames),
                latents_BCTHW,
                self._embedding.kernel_size[0],
                self._state,
                self._state.dtype if self._in_fp32 else None,
            )


class CameraAdapter:
    """`WanCamAdapter.forward`, one layer after the other, each on some frames at a time.

    Core runs each layer on all frames as a batch. All layers on one frame after the other would take as little memory,
    but hold the weights of all, a gigabyte in a 14B model.
    """

    def __init__(self, adapter: Any, state: CallState) -> None:
        self._adapter, self._state = adapter, state

    def __call__(self, x: Tensor) -> Tensor:
        adapter = self._adapter
        plain = all(is_plain(block, core.WanCamResidualBlock) for block in adapter.residual_blocks)
        if not self._state.chunked or not plain:
            return core.WanCamAdapter.forward(adapter, x)
        hidden = self._convolved(adapter.conv, x.transpose(1, 2), adapter.pixel_unshuffle)
        for block in adapter.residual_blocks:
            inner = block.relu(self._convolved(block.conv1, hidden))
            self._convolved(block.conv2, inner, add_to=hidden)
            del inner
        return hidden.transpose(1, 2)

    def _convolved(
        self,
        convolution: Any,
        frames_BTCHW: Tensor,
        prepare: Callable[[Tensor], Tensor] | None = None,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """A convolution (B, T, D, h, w) of each frame, laid out as tokens; or `add_to`, with that added."""
        out = add_to
        batch, total = frames_BTCHW.shape[:2]
        unit_bytes = 3 * frames_BTCHW[:, 0].numel() * frames_BTCHW.element_size()
        with self._state.tokens("camera", convolution, total=total, unit_bytes=unit_bytes, multiple=1) as chunks:
            for some in chunks:
                part = frames_BTCHW[:, some].flatten(0, 1)
                made = convolution(part if prepare is None else prepare(part)).unflatten(0, (batch, -1))
                if add_to is not None:
                    add_to[:, some].add_(made)
                    continue
                if out is None:
                    width, height, length = made.shape[2:]
                    out = made.new_empty(batch, total, height, length, width).permute(0, 1, 4, 2, 3)
                out[:, some] = made
        assert out is not None
        return out
