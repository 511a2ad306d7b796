"""Held-out test cases of `demo_model.py`, verdicts on the clips, figures and the contact sheet.

Shapes: ``clip_FCHW`` and ``picture_CHW`` in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.demo_model.clips import UNSEEN, Sprite
from training.demo_model.measure import COLOUR_KEPT, Verdict, follows, judge, see
from training.demo_model.prompts import Clause, join
from training.demo_model.scenes import DIRECTIONS, Scene, action_of, one_shape, two_shapes
from training.demo_model.settings import ClipSettings

# Far from every seed that training draws with.
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A held-out picture whose first shape the prompt moves."""

    scene: Scene

    other_action: str | None
    """Action of the second shape; None if there is only one."""

    @property
    def named(self) -> Sprite:
        return self.scene.sprites[0]

    @property
    def unseen(self) -> bool:
        return (self.named.colour, self.named.shape) in UNSEEN

    def prompt(self, action: str) -> str:
        texts = [_clause(self.named, action)]
        if self.other_action is not None:
            texts.append(_clause(self.scene.sprites[1], self.other_action))
        return join(texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """Verdict on one clip."""

    prompt: str
    shapes: int
    ground: str
    unseen: bool
    verdict: Verdict
    other_followed: bool | None


def held_out(count: int, clip: ClipSettings) -> list[Case]:
    """Draw cases that alternate between one and two shapes, and seen and unseen combinations of colour and shape."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    cases: list[Case] = []
    for index in range(count):
        unseen = index % 4 >= 2
        if index % 2 == 0:
            cases.append(Case(scene=one_shape(rng, clip.travel, unseen=unseen, inside=True), other_action=None))
        else:
            scene, motion = two_shapes(rng, clip.travel, unseen=unseen, inside=True)
            cases.append(Case(scene=scene, other_action=action_of(motion, clip.travel)))
    return cases


def judged(case: Case, clip_FCHW: Tensor, action: str, clip: ClipSettings) -> Judged:
    picture_CHW = case.scene.picture(clip.size)
    return Judged(
        prompt=case.prompt(action),
        shapes=len(case.scene.sprites),
        ground=case.scene.ground.kind,
        unseen=case.unseen,
        verdict=judge(clip_FCHW, picture_CHW, case.named, action, clip.travel),
        other_followed=_other_followed(case, picture_CHW, clip_FCHW[-1], clip.travel),
    )


def summarise(clips: Sequence[Judged]) -> dict[str, dict[str, float | None]]:
    """One line for each kind of picture."""
    kinds = {
        "all": clips,
        "one shape": [clip for clip in clips if clip.shapes == 1],
        "two shapes": [clip for clip in clips if clip.shapes == 2],
        "seen combination": [clip for clip in clips if not clip.unseen],
        "unseen combination": [clip for clip in clips if clip.unseen],
        "plain ground": [clip for clip in clips if clip.ground == "plain"],
        "textured ground": [clip for clip in clips if clip.ground != "plain"],
    }
    return {kind: figures(part) for kind, part in kinds.items() if part}


def figures(clips: Sequence[Judged]) -> dict[str, float | None]:
    verdicts = [clip.verdict for clip in clips]
    others = [clip.other_followed for clip in clips if clip.other_followed is not None]
    return {
        "clips": len(clips),
        "follows %": 100 * _mean([verdict.followed for verdict in verdicts]),
        "lost %": 100 * _mean([verdict.lost for verdict in verdicts]),
        "other follows %": 100 * _mean(others) if others else None,
        "frame 0 dB": _mean([verdict.first_frame_psnr for verdict in verdicts]),
        "frame 0 worst dB": min(verdict.first_frame_psnr for verdict in verdicts),
        "colour distance": _mean([verdict.colour_distance for verdict in verdicts]),
        "colour kept %": 100 * _mean([verdict.colour_distance <= COLOUR_KEPT for verdict in verdicts]),
    }


def table(lines: dict[str, dict[str, float | None]], head: str) -> str:
    """Format named lines that share their columns as a Markdown table."""
    heads = list(next(iter(lines.values())))
    text = ["| " + " | ".join((head, *heads)) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, values in lines.items():
        cells = ("–" if value is None else f"{value:.4g}" for value in values.values())
        text.append("| " + " | ".join((name, *cells)) + " |")
    return "\n".join(text)


def sheet_line(case: Case, clips: Sequence[Tensor], clip: ClipSettings) -> list[Tensor]:
    """Return the input picture, the first frame, then the last frame of every direction."""
    return [case.scene.picture(clip.size), clips[0][0], *(made[-1] for made in clips)]


def save_sheet(lines: Sequence[Sequence[Tensor]], path: Path) -> None:
    stacked = torch.cat([torch.cat(list(line), dim=2) for line in lines], dim=1)
    pixels = ((stacked + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, quality=85)


def _mean(values: Sequence[float] | Sequence[bool]) -> float:
    return float(np.mean(values))


def _other_followed(case: Case, picture_CHW: Tensor, last_CHW: Tensor, travel: float) -> bool | None:
    if case.other_action is None:
        return None
    rgb = case.scene.sprites[1].rgb
    before, after = see(picture_CHW, rgb), see(last_CHW, rgb)
    moved = (after.centre[0] - before.centre[0], after.centre[1] - before.centre[1])
    return follows(moved, case.other_action, travel)


def _clause(sprite: Sprite, action: str) -> str:
    return Clause(colour=sprite.colour, shape=sprite.shape, action=action).plain()


ACTIONS = tuple(DIRECTIONS)
