"""The denoiser: an I2VGenXLUNet, trained on cached latents.

Shapes: ``clip_BCFHW`` latents, ``states_BLD`` text, ``embeds_BE`` picture embedding.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import I2VGenXLUNet
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from training.demo_model.groups import CLIPS, Groups
from training.demo_model.muon import MuonAdamW
from training.demo_model.noise import build_scheduler, image_latents, random_timesteps
from training.demo_model.schedule import warm_cosine, warm_hold
from training.demo_model.settings import BatchMakeup, DenoiserSettings, Phase, Settings
from training.demo_model.text import text_states, tokenize
from training.demo_model.threads import ThreadTuner

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Clips with their conditioning."""

    clip_BCFHW: torch.Tensor
    states_BLD: torch.Tensor
    embeds_BE: torch.Tensor

    ways: int
    """Number of successive clips that share a picture and their noise."""


def build_denoiser(settings: DenoiserSettings, context_width: int, size: int) -> I2VGenXLUNet:
    return I2VGenXLUNet(
        sample_size=size,
        down_block_types=settings.down_blocks,
        up_block_types=settings.up_blocks,
        block_out_channels=settings.channels,
        layers_per_block=1,
        norm_num_groups=settings.groups,
        cross_attention_dim=context_width,
        attention_head_dim=settings.head_width,
    )


class DenoiserTraining:
    """Training state through all phases: the denoiser, its running average and its optimiser."""

    def __init__(self, settings: Settings, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        torch.manual_seed(settings.seed)
        self._settings = settings.denoiser
        self._tokenizer, self._text_encoder = tokenizer, text_encoder
        self._rng = np.random.default_rng(settings.seed)
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._alphas = build_scheduler().alphas_cumprod
        self.denoiser = build_denoiser(settings.denoiser, settings.text.width, settings.clip.size // 8)
        # Fused attention suits long sequences; six frames or 36 positions are faster without it.
        self.denoiser.set_attn_processor(AttnProcessor())
        average = get_ema_multi_avg_fn(self._settings.average)
        self.average = AveragedModel(self.denoiser, multi_avg_fn=average)
        self._optimizer = MuonAdamW(self.denoiser, self._settings.learning_rate)

    def run(self, phase: Phase, groups: Groups, place: Path, save_every: int = 100) -> None:
        """Train one phase. Resumes from the state in the given file if there is one, and saves the state there."""
        start = 0
        if place.exists():
            state = torch.load(place)
            start = state["step"]
            self.resume(state)
        rate = warm_cosine(phase.steps, warm=20) if phase.cooling else warm_hold()
        threads = ThreadTuner()
        bar = tqdm(range(start, phase.steps), desc=phase.name, unit="step", initial=start, total=phase.steps)
        smooth = 0.0
        # eval() turns off the dropout that diffusers builds in, which is too much for a model this small.
        self.denoiser.eval()
        for step in bar:
            makeup = phase.makeups[int(self._rng.integers(len(phase.makeups)))]
            loss = self._loss(self._batch(groups, makeup))
            loss.backward()
            nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
            self._optimizer.step(phase.share * rate(step))
            self.average.update_parameters(self.denoiser)
            threads.tick()
            smooth = float(loss.detach()) if step == start else 0.98 * smooth + 0.02 * float(loss.detach())
            bar.set_postfix(loss=f"{smooth:.4f}")
            if (step + 1) % save_every == 0:
                self._save(place, step + 1)
        self._save(place, phase.steps)

    def _save(self, place: Path, step: int) -> None:
        """Write a second file and rename it, so that a kill while writing leaves the last complete state."""
        fresh = place.with_suffix(".new")
        torch.save({**self.state(), "step": step}, fresh)
        fresh.replace(place)

    def state(self) -> dict[str, Any]:
        """Return everything that the next step depends on, the random generators included."""
        return {
            "denoiser": self.denoiser.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "draws": self._rng.bit_generator.state,
            "noise": self._generator.get_state(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.denoiser.load_state_dict(state["denoiser"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.bit_generator.state = state["draws"]
        self._generator.set_state(state["noise"])

    def averaged(self) -> I2VGenXLUNet:
        return self.average.module

    def _batch(self, groups: Groups, makeup: BatchMakeup) -> Batch:
        rows = self._rng.choice(len(groups), size=makeup.groups, replace=False)
        clips, prompts = [], []
        embeds = groups.embeds_NE[rows].repeat_interleave(makeup.ways, dim=0)
        for place, row in enumerate(rows):
            ways = self._rng.choice(CLIPS, size=makeup.ways, replace=False)
            cast, clip = groups.casts[row], groups.latents_NDFCHW[row, ways, :: makeup.stride].float()
            actions = [cast.actions[way] for way in ways]
            if self._rng.random() < self._settings.stand:
                actions[0] = ("stays",) * len(cast.names)
                clip[0] = clip[0, :1]
            if self._rng.random() < self._settings.drop:
                prompts += [""] * len(actions)
                embeds[place * len(actions) : (place + 1) * len(actions)] = 0
            else:
                prompts += [cast.prompt(each, self._rng) for each in actions]
            clips.append(clip)
        with torch.no_grad():
            states = text_states(self._text_encoder, tokenize(self._tokenizer, prompts))
        clip_BCFHW = torch.cat(clips).transpose(1, 2)
        return Batch(clip_BCFHW=clip_BCFHW, states_BLD=states, embeds_BE=embeds, ways=makeup.ways)

    def _loss(self, batch: Batch) -> torch.Tensor:
        clip, ways = batch.clip_BCFHW, batch.ways
        count = clip.shape[0] // ways
        noise = torch.randn(count, *clip.shape[1:], generator=self._generator).repeat_interleave(ways, dim=0)
        steps = random_timesteps(count, self._generator).repeat_interleave(ways)
        fps = torch.randint(4, 31, (count,), generator=self._generator).repeat_interleave(ways)
        signal, grain = (part.sqrt().view(-1, 1, 1, 1, 1) for part in (self._alphas[steps], 1 - self._alphas[steps]))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.denoiser(
                signal * clip + grain * noise,
                steps,
                fps=fps,
                image_latents=image_latents(clip[:, :, 0], clip.shape[2]),
                image_embeddings=batch.embeds_BE.unsqueeze(1),
                encoder_hidden_states=batch.states_BLD,
                return_dict=False,
            )[0]
        error = (predicted.float() - (signal * noise - grain * clip)).square()
        return (error * change_weight(clip)).mean()


def change_weight(clip_BCFHW: torch.Tensor, extra: float = 3.0) -> torch.Tensor:
    """Return loss weights (B, 1, F, H, W), higher at the few positions that change, which the prompt is about."""
    change = (clip_BCFHW - clip_BCFHW[:, :, :1]).abs().mean(1, keepdim=True)
    weight = 1 + extra * change.clamp(max=1)
    # The first frame must equal the picture, but is only one of sixteen in the mean.
    weight[:, :, 0] = extra
    return weight
