"""Interrupted training of the denoiser, which takes hours, resumes with the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.demo_model import threads
from training.demo_model.denoiser import Batch, DenoiserTraining
from training.demo_model.groups import CLIPS, Cast, Groups
from training.demo_model.settings import BatchMakeup, Drawing, Phase, Settings
from training.demo_model.text import build_text_encoder
from training.demo_model.tokens import build_tokenizer

FRAMES, LATENT = 4, 12
DRAWING = Drawing(name="tiny", groups=6, pairs=0.0, frames=FRAMES)
WAYS = (("left",), ("right",), ("up",), ("down",))
MAKEUPS = (BatchMakeup(stride=1, groups=1, ways=2), BatchMakeup(stride=1, groups=1))
PHASE = Phase(name="tiny", drawing=DRAWING, makeups=MAKEUPS, steps=5)


@pytest.fixture(scope="module")
def groups() -> Groups:
    rng = torch.Generator().manual_seed(1)
    return Groups(
        latents_NDFCHW=torch.randn(DRAWING.groups, CLIPS, FRAMES, 4, LATENT, LATENT, generator=rng),
        embeds_NE=torch.randn(DRAWING.groups, Settings().text.width, generator=rng),
        casts=[Cast(names=(("red", "circle"),), actions=WAYS)] * DRAWING.groups,
    )


class KilledError(Exception):
    pass


class Fragile(DenoiserTraining):
    """Training that is killed in the given step."""

    steps_left = 3

    def _loss(self, batch: Batch) -> torch.Tensor:
        if self.steps_left == 0:
            raise KilledError
        self.steps_left -= 1
        return super()._loss(batch)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_phase_that_was_killed_ends_as_one_that_was_not(
    groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the tuner would change the number of threads between the runs, and with it the rounding.
    monkeypatch.setattr(threads, "_usable_cores", lambda: 1)
    settings = Settings()
    tokenizer = build_tokenizer(settings.text.tokens)
    torch.manual_seed(0)
    text_encoder = build_text_encoder(settings.text, tokenizer).eval()
    whole = DenoiserTraining(settings, tokenizer, text_encoder)
    whole.run(PHASE, groups, tmp_path / "whole.pt", save_every=2)
    place = tmp_path / "partly.pt"
    with pytest.raises(KilledError):
        Fragile(settings, tokenizer, text_encoder).run(PHASE, groups, place, save_every=2)
    assert torch.load(place)["step"] == 2
    resumed = DenoiserTraining(settings, tokenizer, text_encoder)
    resumed.run(PHASE, groups, place, save_every=2)
    assert [file.name for file in tmp_path.glob("*.new")] == []
    for name, weight in whole.averaged().state_dict().items():
        torch.testing.assert_close(resumed.averaged().state_dict()[name], weight, rtol=1e-4, atol=1e-6)
