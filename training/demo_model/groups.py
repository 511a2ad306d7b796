"""What the denoiser is taught on: one picture, and four clips that differ only in the direction asked for.

The frames are encoded once. The four clips of a group share a batch and their noise, so that nothing but
the prompt tells them apart.

Shapes: ``latents_NDFCHW`` (groups, directions, frames, channels, height, width), ``embeds_NE``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from training.demo_model.prompts import Clause, join
from training.demo_model.scenes import DIRECTIONS, STAY, Point, Scene, one_shape, two_shapes
from training.demo_model.settings import ClipSettings, Drawing
from training.demo_model.vision import embed_pictures


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """Who is in the picture: the shape that goes in all directions, and the other with its one action."""

    colour: str
    shape: str
    other: Clause | None

    def prompt(self, action: str, rng: np.random.Generator) -> str:
        """One wording; the shape that stays may go unnamed, and either may be named first."""
        texts = [Clause(colour=self.colour, shape=self.shape, action=action).varied(rng)]
        if self.other is not None and (self.other.action != "stays" or rng.random() < 0.6):
            texts.insert(int(rng.integers(2)), self.other.varied(rng))
        return join(texts)

    @property
    def may_stand(self) -> bool:
        """Whether a picture that stands still shows "the first shape stays"."""
        return self.other is None or self.other.action == "stays"


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    latents_NDFCHW: torch.Tensor
    embeds_NE: torch.Tensor
    casts: list[Cast]

    def __len__(self) -> int:
        return len(self.casts)


@torch.no_grad()
def build_groups(
    clip: ClipSettings,
    vae: AutoencoderKL,
    image_encoder: CLIPVisionModelWithProjection,
    drawing: Drawing,
    seed: int,
) -> Groups:
    """Draws and encodes groups; no two drawings share a picture."""
    rng = np.random.default_rng((seed, *drawing.name.encode()))
    latents, embeds, casts = [], [], []
    for _ in tqdm(range(drawing.groups), desc="clips", unit="group"):
        scene, motion = _draw_scene(rng, clip.travel, drawing.pairs)
        pictures = _pictures(scene, motion, clip, drawing.frames)
        with torch.autocast("cpu", torch.bfloat16):
            encoded = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(16)])
        moved = encoded[1:].unflatten(0, (len(DIRECTIONS), drawing.frames - 1))
        start = encoded[:1].expand(len(DIRECTIONS), 1, -1, -1, -1)
        latents.append(torch.cat([start, moved], dim=1).half())
        embeds.append(embed_pictures(image_encoder, pictures[:1])[0])
        casts.append(_cast(scene, motion, clip.travel))
    return Groups(latents_NDFCHW=torch.stack(latents), embeds_NE=torch.stack(embeds), casts=casts)


def _draw_scene(rng: np.random.Generator, travel: float, pairs: float) -> tuple[Scene, Point | None]:
    if rng.random() < pairs:
        return two_shapes(rng, travel)
    return one_shape(rng, travel), None


def _pictures(scene: Scene, motion: Point | None, clip: ClipSettings, frames: int) -> torch.Tensor:
    """The picture, then the later frames of all directions: (1 + directions × (frames − 1), 3, H, W)."""
    clips = []
    for dx, dy in DIRECTIONS.values():
        motions = [(dx * clip.travel, dy * clip.travel)] + ([] if motion is None else [motion])
        clips.append(scene.clip(tuple(motions), frames, clip.size))
    return torch.cat([clips[0][:1], *(frames_FCHW[1:] for frames_FCHW in clips)])


def _cast(scene: Scene, motion: Point | None, travel: float) -> Cast:
    first = scene.sprites[0]
    if motion is None:
        return Cast(colour=first.colour, shape=first.shape, other=None)
    second = scene.sprites[1]
    other = Clause(colour=second.colour, shape=second.shape, action=action_of(motion, travel))
    return Cast(colour=first.colour, shape=first.shape, other=other)


def action_of(motion: Point, travel: float) -> str:
    if motion == STAY:
        return "stays"
    return next(name for name, (dx, dy) in DIRECTIONS.items() if (dx * travel, dy * travel) == motion)
