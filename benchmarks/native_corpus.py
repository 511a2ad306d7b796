"""Plans of VRAM Fit for the video templates that come with ComfyUI, on cards of 8, 12 and 24 GB.

Run: `.venv/bin/python benchmarks/native_corpus.py [--only NAME] [--out FILE]`. VRAM Fit is put into each template, the
clip and the model's file are read from the graph, and the run is planned as the node would plan it, on meta tensors.
Each row is printed, and written, as it ends. At last come the templates without one, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from comfy_host import setup  # noqa: E402
from comfy_host.client import Client  # noqa: E402
from comfy_host.server import Server  # noqa: E402
from comfy_host.workflow import to_prompt  # noqa: E402
from graphs.insertion import insert_vram_fit  # noqa: E402
from graphs.templates import open_video_templates  # noqa: E402

from benchmarks.corpus.clips import Clip, sampled  # noqa: E402
from benchmarks.corpus.models import known_model  # noqa: E402
from benchmarks.corpus.plans import NotFittedError, Planner  # noqa: E402
from i2v_core.planning.cards import CARDS  # noqa: E402

CARD_NAMES = ("8 GB", "12 GB", "24 GB")
GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A template, and what is planned for the largest clip that it samples with a model."""

    template: str
    model: str
    stored: str
    """How the file holds weights."""
    size: str
    core_bytes: int
    """Activations of core's own call, one guidance branch."""
    weights_bytes: int
    cards: dict[str, dict[str, Any]]
    """Plans by the card's name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="templates whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    chosen = {name: file for name, file in open_video_templates().items() if options.only in name}
    with Server(setup.find(Path(sys.executable))) as server:
        object_info = Client(server.url).object_info()
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    print(f"{'template':<44} {'model':<22} {'size':<14} {'core':>6}  " + "  ".join(f"{it:<28}" for it in CARD_NAMES))
    for name, file in chosen.items():
        for row in _rows(name, json.loads(file.read_text("utf-8")), object_info):
            if isinstance(row, str):
                left_out[name] = row
                continue
            rows.append(row)
            print(_line(row), flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps([asdict(it) for it in rows], indent=2) + "\n", "utf-8")
    for name, reason in left_out.items():
        print(f"{name:<44} {reason}")


def _rows(name: str, workflow: dict[str, Any], object_info: dict[str, Any]) -> Iterator[Row | str]:
    """The rows of a template, or why it has none."""
    insert_vram_fit(workflow)
    largest: dict[str, tuple[str, Clip]] = {}
    for it in sampled(to_prompt(workflow, object_info)):
        model = known_model(it.file)
        if model is None or it.clip is None:
            yield f"{it.file}: " + ("no configuration" if model is None else "its size is that of a file")
            continue
        before = largest.get(model.name)
        if before is None or it.clip.pixels > before[1].pixels:
            largest[model.name] = (it.file, it.clip)
    for file, clip in largest.values():
        model = known_model(file)
        assert model is not None
        try:
            planner = Planner(model.at(clip), one_byte=model.stored != "16 bits")
            plans = {card: planner.within(CARDS[card].free_bytes) for card in CARD_NAMES}
        except NotFittedError as error:
            yield str(error)
            continue
        except RuntimeError as error:  # PyTorch's: a shape that cannot be traced
            yield f"{model.name} {clip} cannot be planned: {str(error).splitlines()[0]}"
            continue
        first = plans[CARD_NAMES[0]]
        yield Row(
            template=name,
            model=model.name,
            stored=model.stored,
            size=str(clip),
            core_bytes=first.stock_bytes,
            weights_bytes=first.weights_bytes,
            cards={card: asdict(plan) for card, plan in plans.items()},
        )


def _line(row: Row) -> str:
    cells = (_cell(row, plan) for plan in row.cards.values())
    figures = "  ".join(f"{cell:<28}" for cell in cells)
    return f"{row.template:<44} {row.model:<22} {row.size:<14} {row.core_bytes / GIB:>6.2f}  {figures}"


def _cell(row: Row, plan: dict[str, Any]) -> str:
    """Activations, and the weights that stay, in GiB; or the remedy of a refusal."""
    if plan["needed_bytes"] is None:
        return "refused: " + plan["refusal"].rpartition(":")[2].strip()
    weights = f"{plan['resident_bytes'] / GIB:.1f} of {row.weights_bytes / GIB:.1f}"
    how = "unchunked" if plan["workspace_bytes"] is None else "chunked"
    return f"{plan['needed_bytes'] / GIB:.2f} {how}, {weights}"


if __name__ == "__main__":
    main()
