"""Previews by the host's tiny autoencoder (TAESD), if the user asks for them and has its file.

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
# The largest layers have 64 fp32 channels at the size of the preview. Three of them are live at once (108 MiB for
# 384×384); the rest is workspace for the kernels.
_BYTES_PER_PIXEL = 5 * 64 * 4


class TinyDecoder:
    """Decodes latents into small preview frames. Use `find_tiny_decoder` to get one."""

    def __init__(self, file: Path, device: torch.device) -> None:
        """Load the decoder; a file that does not hold one raises whatever the host raises."""
        self._device = device
        taesd: Any = TAESD(None, str(file), latent_channels=4)
        self._taesd = taesd.eval().to(device)

    def needed_bytes(self, latents_1CThw: Tensor) -> int:
        """Return the device memory that decoding takes, one frame at a time."""
        height, width = _preview_size(latents_1CThw)
        return _BYTES_PER_PIXEL * _COMPRESSION**2 * height * width

    @torch.no_grad()
    def frames(self, latents_1CThw: Tensor) -> list[Image.Image]:
        """Decode all frames at preview size; raise if the user has interrupted."""
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
    """Load the decoder for the model's latents; None if there is none, no file, or too little free memory."""
    name = tiny_decoder(architecture.config(family_of(architecture).decoder))
    if name is None:
        return None
    files = [Path(folder) / f"{name}.safetensors" for folder in folder_paths.get_folder_paths(_FOLDER)]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        logger.warning("TAESD previews need models/%s/%s.safetensors; showing rough ones", _FOLDER, name)
        return None
    if management.get_free_memory(device) < 4 * file.stat().st_size:
        return None
    try:
        return TinyDecoder(file, device)
    # A failed preview must not end a run, whatever is wrong with the file.
    except Exception as error:
        logger.warning("%s does not hold a preview decoder (%s); showing rough previews", file, error)
        return None


def _preview_size(latents_1CThw: Tensor) -> tuple[int, int]:
    """Return height and width in latent space, reduced if the preview would be larger than it is shown."""
    height, width = latents_1CThw.shape[-2:]
    scale = min(1.0, SIDE_PIXELS / _COMPRESSION / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
