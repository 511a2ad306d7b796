"""The face in Wan Animate: encoded an image at a time, and attended to by each frame's tokens."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.wan import model_animate as core
from torch import Tensor

from ..calls import CallState
from ..model import own_method

_IMAGE_TENSORS = 5
"""Tensors of 32 channels in an image's size that the encoder of a face has at a time."""


class FaceBlock:
    """`FaceBlock.forward`, some frames at a time."""

    def __init__(self, block: Any, state: CallState) -> None:
        self._block, self._state = block, state
        self._core = own_method(block)

    def __call__(self, x: Tensor, motion_vec: Tensor, motion_mask: Tensor | None = None) -> Tensor:
        if not self._state.chunked or motion_mask is not None:
            return self._core(x, motion_vec, motion_mask)
        block = self._block
        batch, _, width = x.shape
        count, heads = motion_vec.shape[1], block.heads_num
        modules = (block.pre_norm_motion, block.linear1_kv, block.k_norm)
        with self._state.tokens("face", *modules, total=count, unit_bytes=1):
            keys, values = block.linear1_kv(block.pre_norm_motion(motion_vec)).chunk(2, dim=-1)  # (B, T, tokens, D)
            keys = block.k_norm(keys.unflatten(3, (heads, -1))).to(values).flatten(3)
        frames_BTnD = x.unflatten(1, (count, -1))
        out = torch.empty_like(frames_BTnD)
        unit_bytes = 4 * batch * frames_BTnD.shape[2] * width * x.element_size()
        modules = (block.pre_norm_feat, block.linear1_q, block.q_norm, block.linear2)
        with self._state.tokens("face", *modules, total=count, unit_bytes=unit_bytes, multiple=1) as chunks:
            for frames in chunks:
                query = block.linear1_q(block.pre_norm_feat(frames_BTnD[:, frames].flatten(0, 1)))
                query = block.q_norm(query.unflatten(2, (heads, -1))).to(values).flatten(2)
                attended = core.optimized_attention(
                    query,
                    keys[:, frames].flatten(0, 1),
                    values[:, frames].flatten(0, 1),
                    heads=heads,
                    transformer_options=self._state.attention_options,
                )
                del query
                out[:, frames] = block.linear2(attended).unflatten(0, (batch, -1))
                del attended
        return out.flatten(1, 2)


class AfterPatchEmbedding:
    """`AnimateWanModel.after_patch_embedding`, with the images of the face encoded some at a time.

    Core encodes eight, which takes more than the blocks where the video is small.
    """

    def __init__(self, model: Any, state: CallState) -> None:
        self._model, self._state = model, state

    def __call__(
        self, x: Tensor, pose_latents: Tensor | None, face_pixel_values: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        own = core.AnimateWanModel.after_patch_embedding
        if not self._state.chunked or face_pixel_values is None:
            return own(self._model, x, pose_latents, face_pixel_values)
        x, _ = own(self._model, x, pose_latents, None)
        motion = self._motion(face_pixel_values)
        # The first latent frame is the reference image, and shows no face; nor do those after the video of it.
        faces = motion.new_zeros(motion.shape[0], x.shape[2], *motion.shape[2:])
        count = min(motion.shape[1], x.shape[2] - 1)
        faces[:, 1 : count + 1] = motion[:, :count]
        return x, faces

    def _motion(self, pixels_BCTHW: Tensor) -> Tensor:
        """Tokens of the face (B, T, tokens, D), for each latent frame of its video."""
        encoder = self._model.motion_encoder.enc
        images = pixels_BCTHW.movedim(2, 1).flatten(0, 1)
        features: Tensor | None = None
        unit_bytes = _IMAGE_TENSORS * images[0].numel() // 3 * 32 * images.element_size()
        with self._state.tokens(
            "face_images", encoder.net_app, total=images.shape[0], unit_bytes=unit_bytes, multiple=1
        ) as chunks:
            for some in chunks:
                made: Tensor = encoder.net_app(images[some])
                if features is None:
                    features = made.new_empty(images.shape[0], made.shape[1])
                features[some] = made
        assert features is not None
        directions = self._model.motion_encoder.dec.direction(encoder.fc(features))
        return self._model.face_encoder(directions.unflatten(0, (pixels_BCTHW.shape[0], -1)))
