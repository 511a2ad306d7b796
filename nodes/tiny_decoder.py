"""Previews by the host's tiny autoencoder (TAESD), where the user asks for them and has its file.

Shape legend: C latent channels, T latent frames, h/w latent size.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from comfy.taesd.taesd import TAESD
from PIL import Image
from torch import Tensor

from ..i2v_core.families import Architecture, family_of
from ..i2v_core.families.preview import tiny_decoder
from .preview import SIDE_PIXELS

logger = logging.getLogger(__name__)

_FOLDER = "vae_approx"
_COMPRESSION = 8
# Its largest layers have 64 channels in fp32 at the picture's size. Three of them live at once, which is 108 MiB for
# 384×384; the rest is for what kernels take beside.
_BYTES_PER_PIXEL = 5 * 64 * 4


class TinyDecoder:
    """Made by `find_tiny_decoder`."""

    def __init__(self, file: Path, device: torch.device) -> None:
        """Raises whatever the host does for a file that is no decoder."""
        self._device = device
        taesd: Any = TAESD(None, str(file), latent_channels=4)
        self._taesd = taesd.eval().to(device)

    def needed_bytes(self, latents_1CThw: Tensor) -> int:
        """What decoding takes on the device, a frame at a time."""
        height, width = _preview_size(latents_1CThw)
        return _BYTES_PER_PIXEL * _COMPRESSION**2 * height * width

    @torch.no_grad()
    def frames(self, latents_1CThw: Tensor) -> list[Image.Image]:
        """Pictures of all frames, no larger than previews are. Raises when the user has interrupted."""
        size = _preview_size(latents_1CThw)
        pictures: list[Image.Image] = []
        for frame_1Chw in latents_1CThw[0].transpose(0, 1)[:, None]:
            management.throw_exception_if_processing_interrupted()
            small_1Chw = torch.nn.functional.interpolate(frame_1Chw.float(), size=size, mode="area")
            colours_3HW = self._taesd.decode(small_1Chw.to(self._device))[0].mul(0.5).add(0.5).clamp(0, 1)
            pixels_HW3 = (colours_3HW.movedim(0, -1) * 255).round().byte().cpu().numpy()
            pictures.append(Image.fromarray(pixels_HW3))
        return pictures


def find_tiny_decoder(architecture: Architecture, device: torch.device) -> TinyDecoder | None:
    """For the model's latents, on the device; None where there is none, no file of it, or too little memory free."""
    name = tiny_decoder(architecture.config(family_of(architecture).decoder))
    if name is None:
        return None
    files = [Path(folder) / f"{name}.safetensors" for folder in folder_paths.get_folder_paths(_FOLDER)]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        logger.warning("previews by TAESD need models/%s/%s.safetensors; rough ones are shown", _FOLDER, name)
        return None
    if management.get_free_memory(device) < 4 * file.stat().st_size:
        return None
    try:
        return TinyDecoder(file, device)
    # A preview must not end a run, whatever is wrong with the file.
    except Exception as error:
        logger.warning("%s is no decoder for previews (%s); rough ones are shown", file, error)
        return None


def _preview_size(latents_1CThw: Tensor) -> tuple[int, int]:
    """Height and width in latent space, made smaller where the preview would be larger than is shown."""
    height, width = latents_1CThw.shape[-2:]
    scale = min(1.0, SIDE_PIXELS / _COMPRESSION / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
