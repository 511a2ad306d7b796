"""The guide's table of what fits which card: every cell is what the planner says."""

from __future__ import annotations

import re

import pytest
from comfy_host.setup import PACK

from i2v_core.families import VideoSize, bundled_architecture
from i2v_core.planning.cards import SYSTEM_SHARE_BYTES, Card
from i2v_core.planning.plan import Plan
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.planning.suggestions import NothingFitsError
from i2v_core.units import GIB

GUIDE = (PACK / "docs" / "guide.md").read_text("utf-8")


def table() -> list[tuple[int, str, str]]:
    """(GB of the card, size, what the guide says) of every cell."""
    _, _, section = GUIDE.partition("## Which settings for which card")
    header, *rows = re.findall(r"^\| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    sizes = header.split(" | ")[1:]
    cells = [row.split(" | ") for row in rows]
    return [(int(name.split()[0]), size, cell) for name, *row in cells for size, cell in zip(sizes, row, strict=True)]


def said_of(plan: Plan) -> str:
    """A cell of the table."""
    if plan.sample.settings.offload_skips:
        way = "parked"
    elif plan.sample.settings.streamed:
        way = "streamed"
    else:
        way = "whole" if plan.sample.settings.workspace_bytes is None else "pieces"
    tiles = ", tiles" if plan.decode.settings.tiling.tile_pixels else ""
    return f"{plan.peak_bytes / GIB:.2f} {way}{tiles}"


@pytest.mark.parametrize(("gigabytes", "video", "said"), table(), ids=lambda it: str(it).replace("×", "x"))
def test_a_cell_is_what_the_planner_says(gigabytes: int, video: str, said: str) -> None:
    width, height, frames = (int(part) for part in video.split("×"))
    size = VideoSize(width_pixels=width, height_pixels=height, frames=frames)
    request = Request(architecture=bundled_architecture("i2vgen-xl"), size=size, precision="fp16")
    free_bytes = gigabytes * GIB - SYSTEM_SHARE_BYTES
    try:
        plan = make_plan(request, Budget(free_bytes=free_bytes, limit_bytes=free_bytes), Card(gigabytes).facts)
    except NothingFitsError as refusal:
        assert said.startswith("refused: ")
        near = refusal.suggestions
        assert near.shorter is not None
        assert near.smaller is not None
        assert f"{near.shorter.frames} frames" in said
        assert f"{near.smaller.width_pixels}×{near.smaller.height_pixels}" in said
    else:
        assert said == said_of(plan)
