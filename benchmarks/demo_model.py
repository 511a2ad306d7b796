"""Measures whether the demo model follows its prompt, and whether all memory-saving settings give the same pictures.

    python benchmarks/demo_model.py --json demo_model.json --sheet demo_model.jpg

Each picture is sampled with prompts for four directions and the same noise: a model that ignores its prompt moves the
shape the same way four times and scores 25 %. Then the first of these pictures are sampled again with other settings
(chunked, streamed, …) and compared with the plain clips.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.demo_model_clips import (
    ACTIONS,
    Case,
    Judged,
    figures,
    held_out,
    judged,
    save_sheet,
    sheet_line,
    summarise,
    table,
)
from benchmarks.demo_model_variants import VARIANTS, Clip, ClipMaker
from i2v_core.families import VideoSize
from i2v_core.planning.plan import Stage
from i2v_core.stages import SamplerSettings
from i2v_core.units import MIB
from training.demo_model.settings import ClipSettings

CLIP = ClipSettings()
# The sheet compares the variants on two pictures, one of them with two shapes.
SHOWN_CASES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Results of one variant."""

    variant: str

    made: list[list[Clip]]
    """Four clips per picture, one for each direction."""

    judged: list[Judged]

    @property
    def clips(self) -> list[Clip]:
        return [clip for four in self.made for clip in four]


def run_variant(maker: ClipMaker, variant: str, cases: Sequence[Case]) -> Row:
    plan = maker.plan(VARIANTS[variant])
    made: list[list[Clip]] = []
    verdicts: list[Judged] = []
    for case in tqdm(cases, desc=variant, unit="picture"):
        picture_CHW = case.scene.picture(CLIP.size)
        four = [maker.make(plan, picture_CHW, case.prompt(action)) for action in ACTIONS]
        verdicts += [judged(case, clip.clip_FCHW, action, CLIP) for clip, action in zip(four, ACTIONS, strict=True)]
        made.append(four)
    return Row(variant=variant, made=made, judged=verdicts)


def compare(row: Row, plain: Row) -> dict[str, float | None]:
    """Compare a row with the plain clips of the same prompts and noise: verdicts, frames and cost."""
    pairs = list(zip(row.clips, plain.clips, strict=False))
    differences = [(made.clip_FCHW - other.clip_FCHW) / 2 for made, other in pairs]
    shown = figures(row.judged)
    return {
        **{head: shown[head] for head in ("clips", "follows %", "lost %", "frame 0 dB", "colour kept %")},
        "largest difference": max(float(difference.abs().max()) for difference in differences),
        "PSNR against plain dB": None if row is plain else _psnr(differences),
        "s a clip": sum(made.seconds for made in row.clips) / len(row.clips),
        **_peaks(row, Stage.SAMPLE),
        **_peaks(row, Stage.DECODE),
    }


def _peaks(row: Row, stage: Stage) -> dict[str, float]:
    """Return the predicted and the highest measured peak of a stage, weights included."""
    reports = [made.report(stage) for made in row.clips]
    return {
        f"{stage.value} MiB predicted": max(report.predicted_peak_bytes for report in reports) / MIB,
        f"{stage.value} MiB": max(report.measured_peak_bytes for report in reports) / MIB,
    }


def _psnr(differences: Sequence[Tensor]) -> float | None:
    """Return the PSNR over all clips, for values in 0…1; None if they are equal."""
    mse = sum(float(difference.double().square().mean()) for difference in differences) / len(differences)
    return None if mse == 0 else float(-10 * torch.tensor(mse).log10())


def save_json(path: Path, arguments: argparse.Namespace, rows: Sequence[Row], lines: dict[str, Any]) -> None:
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"CPU, {torch.get_num_threads()} thread(s), {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "settings": {name: getattr(arguments, name) for name in ("frames", "steps", "guidance", "seed")},
        "pictures": summarise(rows[0].judged),
        "rows": lines,
        "clips": [asdict(clip) for clip in rows[0].judged],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def save_sheets(path: Path, cases: Sequence[Case], rows: Sequence[Row]) -> None:
    """Save a sheet with a line per picture of the first row, and one with a line per picture and variant."""
    save_sheet([_line(case, four) for case, four in zip(cases, rows[0].made, strict=True)], path)
    if len(rows) > 1:
        shown = range(min(SHOWN_CASES, *(len(row.made) for row in rows)))
        lines = [_line(cases[index], row.made[index]) for index in shown for row in rows]
        save_sheet(lines, path.with_name(f"{path.stem}-ways{path.suffix}"))


def _line(case: Case, four: Sequence[Clip]) -> list[Tensor]:
    return sheet_line(case, [made.clip_FCHW for made in four], CLIP)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("assets/demo_model"))
    parser.add_argument(
        "--rows", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="variants; plain always runs"
    )
    parser.add_argument("--images", type=int, default=24, help="held-out pictures, four clips each")
    parser.add_argument("--row-images", type=int, default=6, help="of these, how many for the other variants")
    parser.add_argument("--frames", type=int, default=CLIP.frames)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures and every plain clip's verdict")
    parser.add_argument(
        "--sheet", type=Path, help="where to write the contact sheet; that of the variants goes beside it"
    )
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    size = VideoSize(width_pixels=CLIP.size, height_pixels=CLIP.size, frames=arguments.frames)
    settings = SamplerSettings(steps=arguments.steps, cfg=arguments.guidance, seed=arguments.seed)
    maker = ClipMaker(arguments.model, size, settings)
    cases = held_out(arguments.images, CLIP)
    plain = run_variant(maker, "plain", cases)
    print(table(summarise(plain.judged), "pictures"), flush=True)
    others = [name for name in arguments.rows if name != "plain"] if arguments.row_images else []
    rows = [plain, *(run_variant(maker, name, cases[: arguments.row_images]) for name in others)]
    lines = {row.variant: compare(row, plain) for row in rows}
    print("\n" + table(lines, "variant"))
    if arguments.json is not None:
        save_json(arguments.json, arguments, rows, lines)
    if arguments.sheet is not None:
        save_sheets(arguments.sheet, cases, rows)


if __name__ == "__main__":
    main()
