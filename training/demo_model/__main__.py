"""``python -m training.demo_model``: from nothing to the exported folder.

Every stage leaves its result in the work folder, and a stage whose result is there is not run again; the denoiser,
which takes hours, goes on in the middle of a phase.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, I2VGenXLUNet
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from training.demo_model.denoiser import DenoiserTraining
from training.demo_model.example import example_picture
from training.demo_model.export import export
from training.demo_model.groups import Groups, build_groups
from training.demo_model.settings import Drawing, Settings
from training.demo_model.text import train_text_encoder
from training.demo_model.tokens import build_tokenizer, save_tokenizer
from training.demo_model.vae import train_vae
from training.demo_model.vision import train_image_encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workshop:
    """The stages, each with its place in the work folder."""

    settings: Settings
    folder: Path

    def vae(self) -> AutoencoderKL:
        place = self.folder / "vae"
        if not place.exists():
            train_vae(self.settings).save_pretrained(place)
        return AutoencoderKL.from_pretrained(place).eval()

    def tokenizer(self) -> CLIPTokenizer:
        place = self.folder / "tokenizer"
        if not place.exists():
            save_tokenizer(build_tokenizer(self.settings.text.tokens), place)
        return CLIPTokenizer.from_pretrained(place)

    def text_encoder(self) -> CLIPTextModel:
        place = self.folder / "text_encoder"
        if not place.exists():
            train_text_encoder(self.settings, self.tokenizer()).save_pretrained(place)
        return CLIPTextModel.from_pretrained(place).eval()

    def image_encoder(self) -> CLIPVisionModelWithProjection:
        place = self.folder / "image_encoder"
        if not place.exists():
            train_image_encoder(self.settings).save_pretrained(place)
        return CLIPVisionModelWithProjection.from_pretrained(place).eval()

    def groups(self, drawing: Drawing) -> Groups:
        place = self.folder / f"groups_{drawing.name}.pt"
        if not place.exists():
            chosen = self.settings
            torch.save(build_groups(chosen.clip, self.vae(), self.image_encoder(), drawing, chosen.seed), place)
        return torch.load(place, weights_only=False)

    def denoiser(self) -> I2VGenXLUNet:
        """Goes on from the last state that was written, with the draws that would have come next."""
        training = DenoiserTraining(self.settings, self.tokenizer(), self.text_encoder())
        partly = self.folder / "denoiser_partly.pt"
        for phase in self.settings.denoiser.phases:
            done = self.folder / f"denoiser_{phase.name}.pt"
            if done.exists():
                training.resume(torch.load(done))
                continue
            training.run(phase, self.groups(phase.drawing), partly)
            partly.rename(done)
        return training.averaged()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.demo_model", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"), help="where stages leave their results")
    parser.add_argument("--out", type=Path, default=Path("assets/demo_model"), help="the exported folder")
    parser.add_argument("--picture", type=Path, default=Path("assets/demo_input.png"), help="the example picture")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.work.mkdir(parents=True, exist_ok=True)
    shop = Workshop(settings=Settings(seed=arguments.seed), folder=arguments.work)
    export(
        shop.settings,
        arguments.out,
        tokenizer=shop.folder / "tokenizer",
        vae=shop.vae(),
        text_encoder=shop.text_encoder(),
        image_encoder=shop.image_encoder(),
        unet=shop.denoiser(),
    )
    picture_CHW = example_picture(shop.settings.clip.size)
    pixels = ((picture_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(arguments.picture)


if __name__ == "__main__":
    main()
