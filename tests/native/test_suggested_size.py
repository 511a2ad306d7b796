"""The nearest sizes of a refusal, in each format's own pixels and frames."""

from __future__ import annotations

import math
from typing import Any

import pytest

from .conftest import Core

pytestmark = pytest.mark.host
FORMATS = {
    "Wan21": ((1, 16, 21, 90, 160), "1280×720×81", "37 frames", "880×496"),
    "Wan22": ((1, 48, 31, 44, 80), "1280×704×121", "57 frames", "864×480"),
    "LTXV": ((1, 128, 16, 22, 40), "1280×704×121", "57 frames", "832×448"),
    "HunyuanVideo": ((1, 16, 33, 90, 160), "1280×720×129", "61 frames", "880×496"),
    "HunyuanVideo15": ((1, 32, 31, 44, 80), "1280×704×121", "57 frames", "864×480"),
    "CogVideoX": ((1, 16, 13, 60, 90), "720×480×49", "21 frames", "512×336"),
}
"""By core's name: a latent, that clip in pixels and frames, and half of it in frames and in picture."""


def suggested(core: Core, name: str, shapes: tuple[tuple[int, ...], ...], most: float) -> Any:
    """Suggestions where a clip fits whose latents have at most `most` numbers."""
    import comfy.latent_formats  # pyright: ignore[reportMissingImports]

    kind = getattr(comfy.latent_formats, name, None)
    if kind is None:
        pytest.skip(f"this ComfyUI has no {name}")
    module = core.native("suggested_size")
    return module.suggested_sizes(
        kind(), module.LatentClip(shapes), lambda clip: sum(map(math.prod, clip.shapes)) <= most
    )


@pytest.mark.parametrize("name", FORMATS)
def test_half_of_a_clip(core: Core, name: str) -> None:
    shape, asked, frames, size = FORMATS[name]
    found = suggested(core, name, (shape,), math.prod(shape) / 2)
    assert found.asked == asked
    assert found.remedy(2**30) == f"use {frames}, or {size}, or a budget of 1.00 GiB"


def test_frames_of_minimax_come_in_seventeens(core: Core) -> None:
    """17k+5 frames are 5k+2 latents; the audio that is sampled with them is as long."""
    video, audio = (1, 24, 37, 30, 54), (1, 32, 2, 207)
    found = suggested(core, "MiniMaxH3AV", (video, audio), (math.prod(video) + math.prod(audio)) / 2)
    assert (found.asked, found.frames) == ("864×480×124", 56)
    assert (found.frames - 5) % 17 == 0


def test_audio_is_as_long_as_the_video_whose_latents_it_is_packed_with(core: Core) -> None:
    clip = core.native("suggested_size").LatentClip(((1, 128, 16, 22, 40), (1, 8, 126, 16)))
    shorter = clip.with_frames(8)
    assert shorter.shapes == ((1, 128, 8, 22, 40), (1, 8, 63, 16))
    assert shorter.shape == (1, 1, 128 * 8 * 22 * 40 + 8 * 63 * 16)
    assert clip.with_size(10, 20).shapes == ((1, 128, 16, 10, 20), (1, 8, 126, 16))


def test_where_nothing_fits_a_budget_is_left(core: Core) -> None:
    found = suggested(core, "Wan21", ((1, 16, 21, 90, 160),), 0)
    assert (found.frames, found.size) == (None, None)
    assert found.remedy(2**30) == "use a budget of 1.00 GiB"
