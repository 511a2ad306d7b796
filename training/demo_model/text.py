"""The text encoder, trained on its own before the denoiser.

In joint training its gradient is a hundredth of the denoiser's, and the prompt is ignored for thousands of steps. So it
first learns to tell its words apart: the state of the word that ends a clause must encode that clause's colour, shape
and action, and the state of every token after the text must encode all clauses. Linear probes, discarded afterwards,
read this from the states that become the denoiser's input.

Shapes: ``ids_BL`` token ids, ``states_BLD`` text states.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.demo_model.clips import COLOURS, SHAPES
from training.demo_model.prompts import Clause, join, random_clause
from training.demo_model.scenes import ACTIONS
from training.demo_model.schedule import warm_cosine
from training.demo_model.settings import Settings, TextSettings

log = logging.getLogger(__name__)

MAX_CLAUSES = 2
IGNORED = -100
# Class 0 means "no such clause"; the attributes of a clause count from 1.
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, len(ACTIONS) + 1)


def build_text_encoder(settings: TextSettings, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.width,
            intermediate_size=4 * settings.width,
            projection_dim=settings.width,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=settings.tokens,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def text_states(encoder: CLIPTextModel, ids_BL: torch.Tensor) -> torch.Tensor:
    """Return the states (B, L, D) of the last layer but one, normalised: the input of I2VGen-XL's denoiser."""
    hidden = encoder(ids_BL, output_hidden_states=True).hidden_states
    stack = getattr(encoder, "text_model", encoder)
    return stack.final_layer_norm(hidden[-2])


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Return ids (B, L), padded to the tokenizer's length."""
    encoded = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return encoded.input_ids


def train_text_encoder(settings: Settings, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    text_settings = settings.text
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    encoder = build_text_encoder(text_settings, tokenizer)
    probes = nn.ModuleList(nn.Linear(text_settings.width, sum(CLASSES)) for _ in range(1 + MAX_CLAUSES))
    weights = [*encoder.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=text_settings.learning_rate, betas=(0.9, 0.98), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(text_settings.steps))
    bar = tqdm(range(text_settings.steps), desc="text", unit="step")
    for step in bar:
        ids, targets = _batch(rng, tokenizer, text_settings)
        states = text_states(encoder, ids)
        logits = torch.stack([probe(states) for probe in probes], dim=2)
        loss, right = _probe_loss(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", right=f"{right:.1%}")
    log.info("text encoder: the probes read %.1f %% of all attributes", 100 * right)
    return encoder.eval()


def _batch(
    rng: np.random.Generator, tokenizer: CLIPTokenizer, settings: TextSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ids (B, L) and targets (B, L, probes, 3): probe 0 reads the ends of clauses, the others the padding."""
    prompts = []
    targets = torch.full((settings.batch, settings.tokens, 1 + MAX_CLAUSES, len(CLASSES)), IGNORED)
    for row in range(settings.batch):
        count = int(rng.choice(MAX_CLAUSES + 1, p=(0.05, 0.45, 0.5)))
        clauses = [random_clause(rng) for _ in range(count)]
        texts = [clause.varied(rng) for clause in clauses]
        prompts.append(join(texts))
        end = 0
        for clause, text in zip(clauses, texts, strict=True):
            end += len(text.split())
            targets[row, end, 0] = torch.tensor(_classes(clause))
            end += 1
        after = max(end, 1)
        for slot in range(MAX_CLAUSES):
            classes = _classes(clauses[slot]) if slot < count else (0, 0, 0)
            targets[row, after:, 1 + slot] = torch.tensor(classes)
    return tokenize(tokenizer, prompts), targets


def _classes(clause: Clause) -> tuple[int, int, int]:
    colour = 1 + list(COLOURS).index(clause.colour)
    return colour, 1 + SHAPES.index(clause.shape), 1 + ACTIONS.index(clause.action)


def _probe_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the mean cross-entropy over all targets, and the share predicted right."""
    losses, right = [], []
    for attribute, part in enumerate(logits.split(CLASSES, dim=-1)):
        wanted = targets[..., attribute]
        losses.append(F.cross_entropy(part.flatten(0, 2), wanted.flatten(), ignore_index=IGNORED))
        asked = wanted != IGNORED
        right.append((part.argmax(-1)[asked] == wanted[asked]).float().mean())
    return torch.stack(losses).mean(), float(torch.stack(right).mean())
