"""Checks the guide's table of what fits which card against the planner."""

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
    """Every cell as (GB of the card, video size, text)."""
    _, _, section = GUIDE.partition("## Settings for your card")
    header, *rows = re.findall(r"^\| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    sizes = header.split(" | ")[1:]
    cells = [row.split(" | ") for row in rows]
    return [(int(name.split()[0]), size, cell) for name, *row in cells for size, cell in zip(sizes, row, strict=True)]


def expected_cell(plan: Plan) -> str:
    """The text that a cell of the table should have."""
    if plan.sample.settings.offload_skips:
        settings = "offloaded"
    elif plan.sample.settings.streamed:
        settings = "streamed"
    else:
        settings = "unchunked" if plan.sample.settings.workspace_bytes is None else "chunked"
    tiles = ", tiles" if plan.decode.settings.tiling.tile_pixels else ""
    return f"{plan.peak_bytes / GIB:.2f} {settings}{tiles}"


@pytest.mark.parametrize(("gigabytes", "video", "text"), table(), ids=lambda it: str(it).replace("×", "x"))
def test_a_cell_is_what_the_planner_says(gigabytes: int, video: str, text: str) -> None:
    width, height, frames = (int(part) for part in video.split("×"))
    size = VideoSize(width_pixels=width, height_pixels=height, frames=frames)
    request = Request(architecture=bundled_architecture("i2vgen-xl"), size=size, precision="fp16")
    free_bytes = gigabytes * GIB - SYSTEM_SHARE_BYTES
    try:
        plan = make_plan(request, Budget(free_bytes=free_bytes, limit_bytes=free_bytes), Card(gigabytes).facts)
    except NothingFitsError as refusal:
        assert text.startswith("refused: ")
        suggestions = refusal.suggestions
        assert suggestions.shorter is not None
        assert suggestions.smaller is not None
        assert f"{suggestions.shorter.frames} frames" in text
        assert f"{suggestions.smaller.width_pixels}×{suggestions.smaller.height_pixels}" in text
    else:
        assert text == expected_cell(plan)
