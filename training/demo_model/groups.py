"""Training data of the denoiser: groups of one picture and four clips that differ only in the prompt's actions.

The frames are encoded once. The clips of a group share a batch and their noise, so that only the prompt tells them
apart. With two shapes both actions differ, so the model must learn which action belongs to which shape.

Shapes: ``latents_NDFCHW`` (groups, clips of a group, frames, channels, height, width), ``embeds_NE``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from training.demo_model.prompts import Clause, join
from training.demo_model.scenes import Scene, combinations, motion_of, one_shape, recoloured, two_shapes
from training.demo_model.settings import ClipSettings, Drawing
from training.demo_model.vision import embed_pictures

# Clips per picture: one shape can move in four directions.
CLIPS = 4
# Share of shapes that stay: with two shapes, the names in the prompt must then say which one moves.
STAY_SHARE = 0.35


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """The shapes of a picture and their actions."""

    names: tuple[tuple[str, str], ...]
    """Colour and shape of each."""

    actions: tuple[tuple[str, ...], ...]
    """For each clip, the action of every shape."""

    def prompt(self, actions: tuple[str, ...], rng: np.random.Generator) -> str:
        """Draw a wording with the shapes in any order; one that stays while another moves may be left out."""
        moving = set(actions) != {"stays"}
        texts = [
            Clause(colour=colour, shape=shape, action=action).varied(rng, self._name(colour, shape, rng))
            for (colour, shape), action in zip(self.names, actions, strict=True)
            if not (moving and action == "stays" and rng.random() < 0.25)
        ]
        return join([texts[index] for index in rng.permutation(len(texts))])

    def _name(self, colour: str, shape: str, rng: np.random.Generator) -> str:
        """Draw a name that may leave out colour or shape, which the model must then take from the picture."""
        if not colour:
            return shape
        choice = rng.random()
        if choice < 0.4 and sum(other == shape for _, other in self.names) == 1:
            return shape
        return colour if choice > 0.85 else f"{colour} {shape}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Encoded groups of clips."""

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
    """Draw and encode groups; different drawings have different pictures."""
    rng = np.random.default_rng((seed, *drawing.name.encode()))
    latents, embeds, casts = [], [], []
    for _ in tqdm(range(drawing.groups), desc="clips", unit="group"):
        scene, cast = _draw_scene(rng, clip.travel, drawing)
        pictures = _pictures(scene, cast, clip, drawing.frames)
        with torch.autocast("cpu", torch.bfloat16):
            encoded = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(16)])
        moved = encoded[1:].unflatten(0, (CLIPS, drawing.frames - 1))
        start = encoded[:1].expand(CLIPS, 1, -1, -1, -1)
        latents.append(torch.cat([start, moved], dim=1).half())
        embeds.append(embed_pictures(image_encoder, pictures[:1])[0])
        casts.append(cast)
    return Groups(latents_NDFCHW=torch.stack(latents), embeds_NE=torch.stack(embeds), casts=casts)


def _draw_scene(rng: np.random.Generator, travel: float, drawing: Drawing) -> tuple[Scene, Cast]:
    scene = two_shapes(rng, travel)[0] if rng.random() < drawing.pairs else one_shape(rng, travel)
    shapes = [sprite.shape for sprite in scene.sprites]
    # A recoloured shape may have no colour name, so two of them must differ in shape.
    if rng.random() < drawing.hues and len(set(shapes)) == len(shapes):
        scene = recoloured(rng, scene)
    # At least four combinations exist: the first shape's directions are free whatever the second does.
    choices = combinations(scene, travel)
    moving = (1 - STAY_SHARE) / 4
    odds = np.array([np.prod([STAY_SHARE if action == "stays" else moving for action in each]) for each in choices])
    picked = rng.choice(len(choices), size=CLIPS, replace=False, p=odds / odds.sum())
    names = tuple((sprite.colour, sprite.shape) for sprite in scene.sprites)
    return scene, Cast(names=names, actions=tuple(choices[index] for index in picked))


def _pictures(scene: Scene, cast: Cast, clip: ClipSettings, frames: int) -> torch.Tensor:
    """Draw the picture, then the later frames of all clips: (1 + clips × (frames − 1), 3, H, W)."""
    motions = [tuple(motion_of(action, clip.travel) for action in actions) for actions in cast.actions]
    clips = [scene.clip(each, frames, clip.size) for each in motions]
    return torch.cat([clips[0][:1], *(frames_FCHW[1:] for frames_FCHW in clips)])
