"""Previews of latents: factors fitted to one or many pictures, or read from a model's folder; and tiny decoders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from i2v_core.families import bundled_architecture, read_architecture
from i2v_core.families.preview import (
    FACTORS_FILE,
    colours_at_latent_size,
    fit_factors,
    fit_preview,
    preview_factors,
    preview_frames,
    tiny_decoder,
    write_factors,
)


def test_the_preview_finds_the_colours_of_latents_that_hold_them() -> None:
    """Uses latents that are a linear map of the colours, as an autoencoder's roughly are."""
    generator = torch.Generator().manual_seed(0)
    colours_hw3 = torch.randint(0, 256, (12, 10, 3), generator=generator, dtype=torch.uint8)
    mixing = torch.randn(3, 4, generator=generator)
    latents_1Chw = (colours_hw3 / 255 @ mixing).permute(2, 0, 1)[None]
    picture = Image.fromarray(colours_hw3.numpy()).resize((80, 96), Image.Resampling.NEAREST)
    factors = fit_preview(latents_1Chw, picture)
    frames = preview_frames(torch.stack([latents_1Chw, latents_1Chw.flip(-1)], dim=2), factors)
    assert frames.shape == (2, 12, 10, 3)
    assert (frames[0] - colours_hw3 / 255).abs().max() < 0.05
    assert torch.allclose(frames[1], frames[0].flip(1), atol=1e-6)


def linear_pair(seed: int, mixing: torch.Tensor) -> tuple[torch.Tensor, Image.Image]:
    """Return latents (1, 4, 12, 10) that are a linear map of their picture's colours, and the picture."""
    generator = torch.Generator().manual_seed(seed)
    colours_hw3 = torch.randint(0, 256, (12, 10, 3), generator=generator, dtype=torch.uint8)
    return (colours_hw3 / 255 @ mixing).permute(2, 0, 1)[None], Image.fromarray(colours_hw3.numpy())


def test_factors_of_many_pictures_suit_one_that_they_have_not_seen() -> None:
    mixing = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    factors = fit_factors(linear_pair(seed, mixing) for seed in range(4))
    latents_1Chw, picture = linear_pair(7, mixing)
    preview = preview_frames(latents_1Chw[:, :, None], factors)[0].flatten(0, 1)
    assert (preview - colours_at_latent_size(latents_1Chw, picture)).abs().max() < 0.02


def test_a_model_folder_with_factors_uses_them(tmp_path: Path) -> None:
    mixing = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    pair = linear_pair(1, mixing)
    fitted = preview_factors(tmp_path, *pair)
    assert torch.equal(fitted, fit_preview(*pair))
    own = torch.arange(15.0).reshape(5, 3) / 7
    write_factors(tmp_path / FACTORS_FILE, own, {"pictures": 3})
    assert torch.allclose(preview_factors(tmp_path, *pair), own, atol=1e-6)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "5", "{}", '{"factors": 5}', '{"factors": [[1, 2, 3]]}', '{"factors": [[1, 2], [3]]}', "[" * 100_000]
    + [json.dumps({"factors": [[value, 0, 0]] * 5}) for value in ("x", None, float("nan"), float("inf"), 1e99)],
    ids=lambda content: content[:30],
)
def test_factors_that_cannot_be_used_are_warned_of_and_the_picture_is_fitted(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair = linear_pair(1, torch.eye(3, 4))
    (tmp_path / FACTORS_FILE).write_text(content)
    assert torch.equal(preview_factors(tmp_path, *pair), fit_preview(*pair))
    assert "is not used" in caplog.text


SD1_AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
    "layers_per_block": 2,
    "scaling_factor": 0.18215,
}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "taesd_decoder"),
        ({"sample_size": 768, "latents_mean": None, "_class_name": "AutoencoderKL"}, "taesd_decoder"),
        ({"scaling_factor": 0.13025}, None),
        ({"block_out_channels": [16, 32, 64, 96]}, None),
        ({"latent_channels": 16}, None),
        ({"layers_per_block": 1}, None),
        ({"shift_factor": 0.1}, None),
    ],
)
def test_the_tiny_decoder_depends_on_the_autoencoder(change: dict[str, object], name: str | None) -> None:
    assert tiny_decoder({**SD1_AUTOENCODER, **change}) == name


def test_i2vgen_xl_has_one_and_the_demo_has_none() -> None:
    assert tiny_decoder(bundled_architecture("i2vgen-xl").config("vae")) == "taesd_decoder"
    demo = Path(__file__).parent.parent.parent / "assets" / "demo_model"
    assert tiny_decoder(read_architecture(demo).config("vae")) is None
