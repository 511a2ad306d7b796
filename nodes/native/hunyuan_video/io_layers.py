"""The embedding of latents as patches, and the layer that makes latents of the hidden state."""

from __future__ import annotations

from typing import Any

from comfy.ldm.common_dit import pad_to_patch_size
from comfy.ldm.flux import layers
from comfy.ldm.modules.diffusionmodules.mmdit import PatchEmbed
from torch import Tensor

from ..calls import CallState
from ..patch_embedding import embedded_by_frame
from .hidden_state import Segments, modulated, row_bytes


class LastLayer:
    """`LastLayer.forward`, a chunk of tokens at a time."""

    def __init__(self, layer: Any, state: CallState) -> None:
        self._layer, self._state = layer, state

    def __call__(self, x: Tensor, vec: Tensor, modulation_dims: Segments = None) -> Tensor:
        layer = self._layer
        if not self._state.chunked:
            return layers.LastLayer.forward(layer, x, vec, modulation_dims)
        shift, scale = layer.adaLN_modulation(vec[:, None, :] if vec.ndim == 2 else vec).chunk(2, dim=-1)
        modulation = layers.ModulationOut(shift=shift, scale=scale, gate=scale)
        batch, total, _ = x.shape
        out = x.new_empty(batch, total, layer.linear.out_features)
        with self._state.tokens("head", layer.linear, total=total, unit_bytes=3 * row_bytes(x)) as chunks:
            for tokens in chunks:
                out[:, tokens] = layer.linear(modulated(x, layer.norm_final, modulation, modulation_dims, tokens))
        return out


class PatchEmbedding:
    """`PatchEmbed.forward` for videos, a latent frame at a time.

    Core returns a transposed view of the convolution's result; this writes the tokens as the blocks read them.
    """

    def __init__(self, embedding: Any, state: CallState) -> None:
        self._embedding, self._state = embedding, state

    def __call__(self, x: Tensor) -> Tensor:
        embedding = self._embedding
        if not self._state.chunked:
            return PatchEmbed.forward(embedding, x)
        if embedding.dynamic_img_pad:
            x = pad_to_patch_size(x, embedding.patch_size, padding_mode=embedding.padding_mode)
        tokens_BThwD = embedded_by_frame(embedding.proj, x, embedding.patch_size[0], self._state)
        return embedding.norm(tokens_BThwD.flatten(1, 3))
