"""``python -m training.demo_model``: trains every component and exports the model's folder.

Each component is saved in the work folder, and is not trained again if it is there; the denoiser, which takes hours,
resumes in the middle of a phase.
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
from training.demo_model.export import export
from training.demo_model.groups import Groups, build_groups
from training.demo_model.scenes import example_scene
from training.demo_model.settings import Drawing, Settings
from training.demo_model.text import train_text_encoder
from training.demo_model.tokens import build_tokenizer, save_tokenizer
from training.demo_model.vae import train_vae
from training.demo_model.vision import train_image_encoder

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pipeline:
    """Trains the components, or loads those that the work folder holds."""

    settings: Settings
    folder: Path

    def vae(self) -> AutoencoderKL:
        folder = self.folder / "vae"
        if not folder.exists():
            train_vae(self.settings).save_pretrained(folder)
        return AutoencoderKL.from_pretrained(folder).eval()

    def tokenizer(self) -> CLIPTokenizer:
        folder = self.folder / "tokenizer"
        if not folder.exists():
            save_tokenizer(build_tokenizer(self.settings.text.tokens), folder)
        return CLIPTokenizer.from_pretrained(folder)

    def text_encoder(self) -> CLIPTextModel:
        folder = self.folder / "text_encoder"
        if not folder.exists():
            train_text_encoder(self.settings, self.tokenizer()).save_pretrained(folder)
        return CLIPTextModel.from_pretrained(folder).eval()

    def image_encoder(self) -> CLIPVisionModelWithProjection:
        folder = self.folder / "image_encoder"
        if not folder.exists():
            train_image_encoder(self.settings).save_pretrained(folder)
        return CLIPVisionModelWithProjection.from_pretrained(folder).eval()

    def groups(self, drawing: Drawing) -> Groups:
        file = self.folder / f"groups_{drawing.name}.pt"
        if not file.exists():
            settings = self.settings
            torch.save(build_groups(settings.clip, self.vae(), self.image_encoder(), drawing, settings.seed), file)
        return torch.load(file, weights_only=False)

    def denoiser(self) -> I2VGenXLUNet:
        """Train all phases, resuming from the last saved state with the random draws that would have come next."""
        training = DenoiserTraining(self.settings, self.tokenizer(), self.text_encoder())
        partial = self.folder / "denoiser_partly.pt"
        for phase in self.settings.denoiser.phases:
            done = self.folder / f"denoiser_{phase.name}.pt"
            if done.exists():
                training.resume(torch.load(done))
                continue
            training.run(phase, self.groups(phase.drawing), partial)
            partial.rename(done)
        return training.averaged()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.demo_model", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"), help="folder of the trained components")
    parser.add_argument("--out", type=Path, default=Path("assets/demo_model"), help="the exported folder")
    parser.add_argument("--picture", type=Path, default=Path("assets/demo_input.png"), help="the example picture")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.work.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(settings=Settings(seed=arguments.seed), folder=arguments.work)
    export(
        pipeline.settings,
        arguments.out,
        tokenizer=pipeline.folder / "tokenizer",
        vae=pipeline.vae(),
        text_encoder=pipeline.text_encoder(),
        image_encoder=pipeline.image_encoder(),
        unet=pipeline.denoiser(),
    )
    picture_CHW = example_scene().picture(pipeline.settings.clip.size)
    pixels = ((picture_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(arguments.picture)


if __name__ == "__main__":
    main()
