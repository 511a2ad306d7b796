"""Wan 2.2 TI2V-5B: as Wan, but the picture is the clip's first latent frame, and each token has a time step of its own.

Shape legend: B guidance branches, C latent channels, T latent frames, h/w latent size, S tokens of the clip.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..base import TensorMap
from ..facts import FamilyFacts, VideoSize
from ..folder import pipeline_class, read_json
from ..model import Architecture
from .family import SCHEDULERS, Wan
from .latents import tokens_of_frame


class WanTI2V(Wan):
    """Wan 2.2 TI2V-5B; see `base.Family`."""

    facts = FamilyFacts(
        name="wan-ti2v",
        display_name="Wan 2.2 TI2V-5B",
        spatial_compression=16,
        temporal_compression=4,
        anchor_frames=None,
        latent_channels=48,
        size_multiple=32,
        min_side_pixels=64,
        default_size=VideoSize(width_pixels=1280, height_pixels=704, frames=121),
        default_fps=24,
        default_cfg=5.0,
        optional_inputs=frozenset({"text", "negative_text"}),
        schedulers=SCHEDULERS,
        has_skips=False,
        fp16_unsafe=frozenset({"text_encoder"}),
        from_files=frozenset({"transformer"}),
    )

    def recognises(self, folder: Path) -> bool:
        if pipeline_class(folder) not in ("WanPipeline", "WanImageToVideoPipeline"):
            return False
        return bool(read_json(folder / "model_index.json").get("expand_timesteps"))

    def denoise(self, denoiser: nn.Module, latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
        model: Any = denoiser
        of_frame = tokens_of_frame(latents_BCTHW, model.config.patch_size)
        batch, _, frames, *_ = latents_BCTHW.shape
        steps_BS = timestep.to(latents_BCTHW.device).float().repeat(batch, frames * of_frame)
        steps_BS[:, :of_frame] = 0
        model_input = _with_picture(latents_BCTHW, inputs)
        other_inputs = {name: tensor for name, tensor in inputs.items() if name != "first_latents"}
        return model(model_input, steps_BS, **other_inputs, return_dict=False)[0]

    def latents_to_host(self, architecture: Architecture, latents_BCTHW: Tensor, inputs: TensorMap) -> Tensor:
        return super().latents_to_host(architecture, _with_picture(latents_BCTHW, inputs), inputs)

    def _encoded_frames(self, size: VideoSize) -> int:  # noqa: ARG002
        return 1

    def _condition(self, latents_1CThw: Tensor) -> dict[str, Tensor]:
        return {"first_latents": latents_1CThw}

    def _empty_condition(self, latents_BCThw: Tensor) -> dict[str, Tensor]:
        return {"first_latents": latents_BCThw.new_empty(latents_BCThw[:, :, :1].shape)}


def _with_picture(latents_BCTHW: Tensor, inputs: TensorMap) -> Tensor:
    """Return a copy of the latents whose first frame is the picture's."""
    with_picture_BCTHW = latents_BCTHW.clone()
    with_picture_BCTHW[:, :, :1] = inputs["first_latents"]
    return with_picture_BCTHW
