"""The vision encoder, trained on its own to name the colours and shapes in a picture.

Shapes: ``pictures_BCHW`` in [-1, 1] at any size, ``embeds_BD`` projected embeddings.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from training.demo_model.clips import COLOURS, SHAPES
from training.demo_model.scenes import Scene, still_scene
from training.demo_model.schedule import warm_cosine
from training.demo_model.settings import Settings, VisionSettings

log = logging.getLogger(__name__)


def build_image_encoder(settings: VisionSettings, projection: int) -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=settings.width,
            intermediate_size=2 * settings.width,
            projection_dim=projection,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            image_size=settings.size,
            patch_size=settings.patch,
        )
    )


def build_feature_extractor(settings: VisionSettings) -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": settings.size}, crop_size={"height": settings.size, "width": settings.size}
    )


@torch.no_grad()
def embed_pictures(encoder: CLIPVisionModelWithProjection, pictures_BCHW: torch.Tensor) -> torch.Tensor:
    """Return embeddings (B, D), preparing tensors as the feature extractor prepares files."""
    # Resized in float32: half precision has no antialiasing on the CPU.
    ready = _normalised(pictures_BCHW.float(), encoder.config.image_size)
    return encoder(ready.to(encoder.dtype)).image_embeds


def train_image_encoder(settings: Settings) -> CLIPVisionModelWithProjection:
    vision_settings = settings.vision
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    scenes = [still_scene(rng) for _ in range(vision_settings.pool)]
    pictures = torch.stack([scene.picture(settings.clip.size) for scene in tqdm(scenes, desc="pictures")])
    pictures = _normalised(pictures, vision_settings.size)
    present = torch.stack([_present(scene) for scene in scenes])
    encoder = build_image_encoder(vision_settings, settings.text.width)
    probe = nn.Linear(settings.text.width, present.shape[1])
    weights = [*encoder.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=vision_settings.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(vision_settings.steps))
    bar = tqdm(range(vision_settings.steps), desc="vision", unit="step")
    for step in bar:
        rows = rng.integers(vision_settings.pool, size=vision_settings.batch)
        logits = probe(encoder(pictures[rows]).image_embeds)
        loss = F.binary_cross_entropy_with_logits(logits, present[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            right = ((logits > 0) == (present[rows] > 0)).float().mean()
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", right=f"{float(right):.1%}")
    log.info("vision encoder: loss %.3f at the end", float(loss.detach()))
    return encoder.eval()


def _normalised(pictures_BCHW: torch.Tensor, size: int) -> torch.Tensor:
    small = F.interpolate(pictures_BCHW, (size, size), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(rgb).view(1, 3, 1, 1) for rgb in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (small / 2 + 0.5 - mean) / std


def _present(scene: Scene) -> torch.Tensor:
    """Return one flag per colour, then one per shape."""
    colours = {sprite.colour for sprite in scene.sprites}
    shapes = {sprite.shape for sprite in scene.sprites}
    return torch.tensor([float(name in colours) for name in COLOURS] + [float(name in shapes) for name in SHAPES])
