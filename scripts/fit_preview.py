"""Fits the linear factors of a model's rough previews to many images, and writes them into the model's folder.

`.venv/bin/python scripts/fit_preview.py --model FOLDER [--pictures DIR] [--out FILE]`

Without such factors, previews are fitted to the input image of each video. This script prints how good both are, in dB
(PSNR at latent size): on an image, and on another view of it, since later frames differ from the first. The images used
for evaluation are held out from the fit.

Shape legend: C latent channels, h/w latent size.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

PACK = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PACK))

from i2v_core.chunking import LayerRunner  # noqa: E402
from i2v_core.decoding import ONE_FRAME_UNTILED  # noqa: E402
from i2v_core.errors import BadInputError, I2VError  # noqa: E402
from i2v_core.families import I2VModel, Placed, autoencoder_kl, family_of, load_model  # noqa: E402
from i2v_core.families.pictures import cover, to_tensor  # noqa: E402
from i2v_core.families.preview import (  # noqa: E402
    FACTORS_FILE,
    colours_at_latent_size,
    fit_factors,
    preview_frames,
    write_factors,
)

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
DRAWN = 64
HELD_OUT_EVERY = 4
Pair = tuple[Tensor, Image.Image]


@dataclass(frozen=True, slots=True, kw_only=True)
class Views:
    """An image and a shifted view of it, each with its latents (1, C, h, w)."""

    first: Pair
    second: Pair


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a model folder in diffusers format")
    parser.add_argument("--pictures", type=Path, help="a folder of 8 or more images; default: generated images")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels; default 256")
    parser.add_argument("--out", type=Path, help=f"file to write; default {FACTORS_FILE} in the model's folder")
    chosen = parser.parse_args(arguments)
    try:
        model = load_model(chosen.model)
        pictures = _read(chosen.pictures) if chosen.pictures else _draw(DRAWN)
        views = [_views(model, picture, chosen.size) for picture in pictures]
        if len(views) < 2 * HELD_OUT_EVERY:
            raise BadInputError(f"{len(views)} images are too few", f"use {2 * HELD_OUT_EVERY} or more")
    except I2VError as error:
        print(error, file=sys.stderr)
        return 1
    held_out = views[::HELD_OUT_EVERY]
    seen = [pair for index, it in enumerate(views) if index % HELD_OUT_EVERY for pair in (it.first, it.second)]
    factors = fit_factors(seen)
    facts = _judge(factors, held_out)
    file = chosen.out or chosen.model / FACTORS_FILE
    write_factors(file, factors, {"pictures": len(views) - len(held_out), **facts})
    print(f"written to {file}")
    return 0


def _judge(factors: Tensor, held_out: Sequence[Views]) -> dict[str, float]:
    """Print and return the PSNR in dB on held-out images: of the factors, and of a fit to each image itself."""
    own = [fit_factors([views.first]) for views in held_out]
    rows = {
        "the picture itself": [views.first for views in held_out],
        "another view of it": [views.second for views in held_out],
    }
    print(f"{len(held_out)} images, PSNR in dB (higher is better)       these factors     fitted to the image")
    found: dict[str, float] = {}
    for name, pairs in rows.items():
        shared_db = _mean(_psnr_db(factors, pair) for pair in pairs)
        own_db = _mean(_psnr_db(one, pair) for one, pair in zip(own, pairs, strict=True))
        print(f"  {name:<44}{shared_db:>15.2f}{own_db:>24.2f}")
        key = name.replace(" ", "_")
        found |= {f"{key}_db": round(shared_db, 2), f"{key}_db_if_fitted_to_it": round(own_db, 2)}
    return found


def _psnr_db(factors: Tensor, pair: Pair) -> float:
    """Return the peak signal-to-noise ratio of the preview of an image's latents."""
    latents_1Chw, picture = pair
    preview = preview_frames(latents_1Chw[:, :, None], factors)[0].flatten(0, 1)
    error = float((preview - colours_at_latent_size(latents_1Chw, picture)).square().mean())
    return -10 * math.log10(max(error, 1e-10))


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _views(model: I2VModel, picture: Image.Image, side_pixels: int) -> Views:
    """Cut two squares from the image, shifted by an eighth of their side."""
    shift = max(8, side_pixels // 8)
    larger = cover(picture, side_pixels + shift, side_pixels + shift)
    first = larger.crop((0, 0, side_pixels, side_pixels))
    second = larger.crop((shift, shift, side_pixels + shift, side_pixels + shift))
    return Views(first=(_latents(model, first), first), second=(_latents(model, second), second))


def _latents(model: I2VModel, picture: Image.Image) -> Tensor:
    """Encode an image to scaled latents (1, C, h, w), as the sampler uses them."""
    family = family_of(model.architecture)
    scale = model.architecture.config(family.decoder).get("scaling_factor")
    if family.facts.latent_dimensions != 4 or scale is None:
        raise BadInputError(
            f"{family.facts.display_name} has no image autoencoder", "use previews fitted to the input image"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = model.modules[family.decoder].float().to(device)
    vae = Placed(module=module, device=device, dtype=torch.float32, runner=LayerRunner())
    with torch.no_grad():
        centred = autoencoder_kl.centred(to_tensor(picture))
        return autoencoder_kl.encode_mode(vae, centred, ONE_FRAME_UNTILED, on_chunk=lambda: None) * scale


def _read(folder: Path) -> Iterator[Image.Image]:
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    for file in files:
        with Image.open(file) as picture:
            yield picture.convert("RGB")


def _draw(number: int) -> Iterator[Image.Image]:
    """Generate images of soft light, shapes and fine texture in random colours, the same each time."""
    choose = random.Random(0)

    def colour() -> tuple[int, int, int]:
        return (choose.randrange(256), choose.randrange(256), choose.randrange(256))

    for _ in range(number):
        ground = Image.new("RGB", (4, 4))
        ground.putdata([colour() for _ in range(16)])
        picture = ground.resize((384, 384), Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(picture)
        for _ in range(choose.randrange(3, 12)):
            left, top = choose.randrange(-40, 360), choose.randrange(-40, 360)
            box = (left, top, left + choose.randrange(8, 200), top + choose.randrange(8, 200))
            choose.choice((draw.ellipse, draw.rectangle))(box, fill=colour())
        for _ in range(choose.randrange(20)):
            ends = tuple(choose.randrange(384) for _ in range(4))
            draw.line(ends, fill=colour(), width=choose.randrange(1, 6))
        yield picture.filter(ImageFilter.GaussianBlur(choose.uniform(0, 2)))


if __name__ == "__main__":
    sys.exit(main())
