"""Does the demo model do what its prompt says? One picture, four directions, the same noise.

    python benchmarks/demo_model.py --json demo_model.json --sheet demo_model.png

A model that ignores its prompt moves a shape the same way four times and scores 25 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.demo_model.clips import UNSEEN, Sprite
from training.demo_model.groups import action_of
from training.demo_model.measure import COLOUR_KEPT, Verdict, follows, judge, see
from training.demo_model.prompts import Clause, join
from training.demo_model.sample import DemoModel, Sampling, load_demo_model, sample
from training.demo_model.scenes import DIRECTIONS, Scene, one_shape, two_shapes
from training.demo_model.settings import ClipSettings

# Far from every seed that training draws with.
HELD_OUT_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A held-out picture, who moves in it, and what the other shape does meanwhile."""

    scene: Scene
    other_action: str | None

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
class Row:
    """One clip of one case."""

    prompt: str
    shapes: int
    ground: str
    unseen: bool
    verdict: Verdict
    other_followed: bool | None


def held_out(count: int, clip: ClipSettings) -> list[Case]:
    """By turns one and two shapes, seen and unseen combinations of colour and shape."""
    rng = np.random.default_rng(HELD_OUT_SEED)
    cases = []
    for index in range(count):
        unseen = index % 4 >= 2
        if index % 2 == 0:
            cases.append(Case(scene=one_shape(rng, clip.travel, unseen=unseen, inside=True), other_action=None))
        else:
            scene, motion = two_shapes(rng, clip.travel, unseen=unseen, inside=True)
            cases.append(Case(scene=scene, other_action=action_of(motion, clip.travel)))
    return cases


def run_case(
    model: DemoModel, case: Case, clip: ClipSettings, chosen: Sampling
) -> tuple[list[Row], list[torch.Tensor]]:
    """Its four rows, and the pictures of its line of the contact sheet."""
    picture = case.scene.picture(clip.size)
    clips_BFCHW = sample(model, picture, [case.prompt(action) for action in DIRECTIONS], chosen)
    rows = []
    for action, made in zip(DIRECTIONS, clips_BFCHW, strict=True):
        rows.append(
            Row(
                prompt=case.prompt(action),
                shapes=len(case.scene.sprites),
                ground=case.scene.ground.kind,
                unseen=case.unseen,
                verdict=judge(made, picture, case.named, action, clip.travel),
                other_followed=_other_followed(case, picture, made[-1], clip.travel),
            )
        )
    return rows, [picture, clips_BFCHW[0, 0], *clips_BFCHW[:, -1]]


def summarise(rows: list[Row]) -> dict[str, dict[str, float]]:
    """One line for each kind of picture."""
    kinds = {
        "all": rows,
        "one shape": [row for row in rows if row.shapes == 1],
        "two shapes": [row for row in rows if row.shapes == 2],
        "seen combination": [row for row in rows if not row.unseen],
        "unseen combination": [row for row in rows if row.unseen],
        "plain ground": [row for row in rows if row.ground == "plain"],
        "textured ground": [row for row in rows if row.ground != "plain"],
    }
    return {kind: _figures(part) for kind, part in kinds.items() if part}


def table(summary: dict[str, dict[str, float]]) -> str:
    heads = list(next(iter(summary.values())))
    lines = ["| pictures | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for kind, figures in summary.items():
        lines.append(f"| {kind} | " + " | ".join(f"{figures[head]:.4g}" for head in heads) + " |")
    return "\n".join(lines)


def save_sheet(lines: list[list[torch.Tensor]], path: Path) -> None:
    """Columns: input, first frame, then the last frame of left, right, up, down."""
    stacked = torch.cat([torch.cat(line, dim=2) for line in lines], dim=1)
    pixels = ((stacked + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(np.ascontiguousarray(pixels)).save(path)


def _figures(rows: list[Row]) -> dict[str, float]:
    verdicts = [row.verdict for row in rows]
    others = [row.other_followed for row in rows if row.other_followed is not None]
    return {
        "clips": float(len(rows)),
        "follows %": 100 * _mean([verdict.followed for verdict in verdicts]),
        "lost %": 100 * _mean([verdict.lost for verdict in verdicts]),
        "other follows %": 100 * _mean(others) if others else float("nan"),
        "frame 0 dB": _mean([verdict.first_frame_psnr for verdict in verdicts]),
        "frame 0 worst dB": min(verdict.first_frame_psnr for verdict in verdicts),
        "colour distance": _mean([verdict.colour_distance for verdict in verdicts]),
        "colour kept %": 100 * _mean([verdict.colour_distance <= COLOUR_KEPT for verdict in verdicts]),
    }


def _mean(values: list[float] | list[bool]) -> float:
    return float(np.mean(values))


def _other_followed(case: Case, picture: torch.Tensor, last: torch.Tensor, travel: float) -> bool | None:
    if case.other_action is None:
        return None
    rgb = case.scene.sprites[1].rgb
    before, after = see(picture, rgb), see(last, rgb)
    moved = (after.centre[0] - before.centre[0], after.centre[1] - before.centre[1])
    return follows(moved, case.other_action, travel)


def _clause(sprite: Sprite, action: str) -> str:
    return Clause(colour=sprite.colour, shape=sprite.shape, action=action).plain()


def _arguments() -> argparse.Namespace:
    defaults = Sampling()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/demo_model"))
    parser.add_argument("--images", type=int, default=24, help="held-out pictures, four clips each")
    parser.add_argument("--frames", type=int, default=defaults.frames)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--guidance", type=float, default=defaults.guidance)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="where to write the figures and every clip's verdict")
    parser.add_argument("--sheet", type=Path, help="where to write the contact sheet")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    clip = ClipSettings()
    chosen = Sampling(frames=arguments.frames, steps=arguments.steps, guidance=arguments.guidance)
    model = load_demo_model(arguments.model, getattr(torch, arguments.dtype))
    rows: list[Row] = []
    lines: list[list[torch.Tensor]] = []
    began = time.perf_counter()
    for case in tqdm(held_out(arguments.images, clip), desc="pictures", unit="picture"):
        case_rows, line = run_case(model, case, clip, chosen)
        rows += case_rows
        lines.append(line)
    seconds = (time.perf_counter() - began) / len(rows)
    summary = summarise(rows)
    print(table(summary))
    print(f"{seconds:.1f} s a clip of {chosen.frames} frames, {chosen.steps} steps, guidance {chosen.guidance}")
    if arguments.json is not None:
        record = {"summary": summary, "seconds_a_clip": seconds, "clips": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if arguments.sheet is not None:
        save_sheet(lines, arguments.sheet)


if __name__ == "__main__":
    main()
