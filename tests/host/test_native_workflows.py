"""The shipped workflows for core's own loaders: the files they offer, what their notes say, and their layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from comfy_host.setup import PACK
from comfy_host.workflow import to_prompt
from graphs.insertion import VRAM_FIT, insert_vram_fit

from benchmarks.corpus.clips import sampled
from benchmarks.corpus.models import known_model
from benchmarks.corpus.plans import Planner
from i2v_core.planning.cards import CARDS
from i2v_core.units import GIB

FILES = sorted((PACK / "workflows").glob("i2v_native_*.json"))
WAN = PACK / "workflows" / "i2v_native_wan22_14b.json"
BOXES = """() => app.graph.nodes.map((node) => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
  const height = element ? element.height / app.canvas.ds.scale - 30 : Math.max(node.size[1], node.computeSize()[1]);
  return [node.type, node.pos[0], node.pos[1] - 30, node.pos[0] + node.size[0], node.pos[1] + height];
})"""

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def note_of(workflow: dict[str, Any]) -> str:
    (note,) = (node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    return note


@every_file
def test_every_sampler_has_vram_fit(path: Path) -> None:
    workflow = read(path)
    assert [node["type"] for node in workflow["nodes"]].count(VRAM_FIT) == 1
    assert insert_vram_fit(workflow) == []


@every_file
def test_every_file_of_a_loader_can_be_downloaded(path: Path) -> None:
    """By the page, which reads the nodes, and by hand, from the note."""
    workflow = read(path)
    for node in workflow["nodes"]:
        values = [it for it in node.get("widgets_values", ()) if isinstance(it, str) and it.endswith(".safetensors")]
        offered = {it["name"]: it for it in node["properties"].get("models", ())}
        assert set(values) == set(offered), node["type"]
        for name, it in offered.items():
            assert it["url"].startswith("https://huggingface.co/")
            assert it["url"].endswith(f"/{name}")
            assert f"| [{name}]({it['url']}) | {it['directory']} |" in note_of(workflow)


def test_the_note_on_wan_says_what_is_planned(object_info: dict[str, Any]) -> None:
    workflow = read(WAN)
    (high, low) = sampled(to_prompt(workflow, object_info))
    model = known_model(high.file)
    assert model
    assert high.clip == low.clip
    assert high.clip
    planner = Planner(model.at(high.clip), one_byte=model.stored != "16 bits")
    plan = planner.within(CARDS["8 GB"].free_bytes)
    assert plan.needed_bytes
    said = re.search(
        r"needs about ([\d.]+) GiB beside the weights, where ComfyUI's own takes about ([\d.]+); on an 8 GB card "
        r"about ([\d.]+) of an expert's ([\d.]+) GiB",
        note_of(workflow),
    )
    assert said
    figures = (plan.needed_bytes, plan.stock_bytes, plan.resident_bytes, plan.weights_bytes)
    assert [float(it) for it in said.groups()] == pytest.approx([it / GIB for it in figures], rel=0.1)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize(
    "loaded_page", [("server", False), ("newest_page_server", True)], ids=["classic", "nodes2"], indirect=True
)
def test_no_nodes_overlap(page: Any) -> None:
    for path in FILES:
        page.drop(path)
        page.fit()
        page.wait("all nodes drawn", "app.graph.nodes.every((node) => node.size[1] > 0)")
        boxes = page.raw.evaluate(BOXES)
        for number, (kind, left, top, right, bottom) in enumerate(boxes):
            for other, left_2, top_2, right_2, bottom_2 in boxes[number + 1 :]:
                apart = right <= left_2 or right_2 <= left or bottom <= top_2 or bottom_2 <= top
                assert apart, f"{path.stem}: {kind} and {other}"
