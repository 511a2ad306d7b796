"""Every open video template that comes with the host gets VRAM Fit, stays whole, and is accepted as it was before."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from comfy_host.client import Client, PromptRefusedError
from comfy_host.workflow import to_prompt
from graphs.flat import flat_nodes
from graphs.insertion import VRAM_FIT, insert_vram_fit
from graphs.level import Level, levels
from graphs.placing import node_box
from graphs.templates import open_video_templates

from benchmarks.corpus.clips import Clip, sampled
from benchmarks.corpus.models import known_model
from benchmarks.corpus.plans import Planner
from tests.scripts.graph_parts import loose_ends

TEMPLATES = open_video_templates()
INCOMPLETE = {
    "gsl_starter_1_2": "prompt_no_outputs",  # its user is to draw the node that saves the video
}
"""Templates that the host refuses for more than missing files."""
MISSING_FILE = {"value_not_in_list", "custom_validation_failed"}
"""Errors of loaders whose file is not there."""

every_template = pytest.mark.parametrize("file", TEMPLATES.values(), ids=list(TEMPLATES))


def test_there_are_templates() -> None:
    assert len(TEMPLATES) > 50 or not TEMPLATES


@every_template
def test_it_stays_whole(file: Path) -> None:
    workflow = json.loads(file.read_text("utf-8"))
    before = copy.deepcopy(workflow)
    made = insert_vram_fit(workflow)
    assert made
    assert loose_ends(workflow) == loose_ends(before)
    assert insert_vram_fit(workflow) == []
    ids = [node for level in levels(before) for node in level.nodes]
    assert not {it["id"] for it in made} & set(ids)
    for level, old in zip(levels(workflow), levels(before), strict=True):
        for node in old.nodes:
            assert without_links(level.nodes[node]) == without_links(old.nodes[node])
        new = [level.nodes[node] for node in level.nodes if node not in old.nodes]
        assert not any(node_box(it).overlaps(node_box(other)) for it in new for other in rest(level, it))


@every_template
def test_the_host_accepts_it_as_before(file: Path, client: Client, object_info: dict[str, Any]) -> None:
    workflow = json.loads(file.read_text("utf-8"))
    unknown = {it.node["type"] for it in flat_nodes(workflow)} - set(object_info)
    if unknown:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(unknown))}")
    before = errors_of(client, to_prompt(workflow, object_info))
    insert_vram_fit(workflow)
    prompt = to_prompt(workflow, object_info)
    assert errors_of(client, prompt) == before
    assert {error for _, error, _ in before} <= MISSING_FILE | {INCOMPLETE.get(file.stem, "")}
    for node in prompt.values():
        kinds = set(object_info[node["class_type"]]["output"])
        if kinds & {"LATENT", "GUIDER"} and "MODEL" not in kinds and "model" in node["inputs"]:
            assert prompt[node["inputs"]["model"][0]]["class_type"] == VRAM_FIT


@pytest.mark.parametrize(
    ("name", "model", "clip"),
    [
        ("video_wan2_2_14B_i2v", "Wan 2.2 A14B", Clip(640, 640, 81)),
        ("video_wan2_2_5B_ti2v", "Wan 2.2 TI2V-5B", Clip(1280, 704, 121)),
    ],
)
def test_its_run_is_planned_for_a_card(name: str, model: str, clip: Clip, object_info: dict[str, Any]) -> None:
    """From the graph alone: the file that its loader names, and the clip that it samples."""
    if name not in TEMPLATES:
        pytest.skip("this ComfyUI has no such template")
    workflow = json.loads(TEMPLATES[name].read_text("utf-8"))
    insert_vram_fit(workflow)
    (known, *others) = (known_model(it.file) for it in sampled(to_prompt(workflow, object_info)))
    assert {it.clip for it in sampled(to_prompt(workflow, object_info))} == {clip}
    assert known
    assert {it and it.name for it in (known, *others)} == {model}
    planner = Planner(known.at(clip), one_byte=known.stored != "16 bits")
    little, much = planner.within(7 << 30), planner.within(40 << 30)
    assert little.needed_bytes
    assert much.needed_bytes
    assert little.needed_bytes < much.needed_bytes
    assert little.needed_bytes + little.resident_bytes <= 7 << 30
    assert much.workspace_bytes is None
    assert much.resident_bytes == much.weights_bytes


LOADED = """async (graph) => {
  await app.loadGraphData(graph, true, true, 'template');
  return (await app.graphToPrompt()).output;
}"""
"""Opens a workflow on the page; gives the prompt that the page makes of it."""


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("loaded_page", [("newest_page_server", True)], ids=["newest_nodes2"], indirect=True)
def test_the_page_runs_it_as_it_is_converted_here(page: Any, object_info: dict[str, Any]) -> None:
    """Subgraphs, switches, bypassed groups and two experts among them."""
    for name in ("video_wan2_2_14B_i2v", "video_wan2_2_14B_flf2v", "video_ltx2_i2v", "video_minimax_h3_r2v"):
        if name not in TEMPLATES:
            continue
        workflow = json.loads(TEMPLATES[name].read_text("utf-8"))
        insert_vram_fit(workflow)
        shown = page.raw.evaluate(LOADED, workflow)
        assert inputs_of(shown) == inputs_of(to_prompt(workflow, object_info)), name


def inputs_of(prompt: dict[str, Any]) -> dict[str, Any]:
    """Inputs of each node of a prompt but seeds, which the page may draw."""
    return {
        name: {key: value for key, value in node["inputs"].items() if "seed" not in key}
        for name, node in prompt.items()
    }


def without_links(node: dict[str, Any]) -> dict[str, Any]:
    """A node without what an insertion changes: the ids of links."""
    plain = copy.deepcopy(node)
    for slot in (*plain.get("inputs", ()), *plain.get("outputs", ())):
        slot.pop("link", None)
        slot.pop("links", None)
    return plain


def rest(level: Level, node: dict[str, Any]) -> list[dict[str, Any]]:
    return [it for it in level.nodes.values() if it is not node]


def errors_of(client: Client, prompt: dict[str, Any]) -> set[tuple[str, str, str]]:
    """Errors that the host finds in a prompt: node, kind of error and details."""
    try:
        client.drop(client.queue(prompt))
    except PromptRefusedError as refused:
        found = {
            (f"{name} {node['class_type']}", error["type"], error["details"])
            for name, node in refused.node_errors.items()
            for error in node["errors"]
        }
        return found or {("", refused.error["type"], refused.error["message"])}
    return set()
