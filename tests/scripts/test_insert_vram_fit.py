"""VRAM Fit lands between samplers and their models, and the graph around it stays whole."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfy_host.setup import PACK
from graphs.insertion import VRAM_FIT, insert_vram_fit
from graphs.level import INPUTS, JSON, Level, levels
from graphs.placing import node_box

from .graph_parts import graph, links_agree, node, subgraph

SAMPLER = [("model", "MODEL"), ("latent_image", "LATENT")]


def sampler(number: int, **more: Any) -> JSON:
    return node(number, "KSampler", SAMPLER, ["LATENT"], **more)


def loader(number: int, **more: Any) -> JSON:
    return node(number, "UNETLoader", [], ["MODEL"], **more)


def fits(level: Level) -> list[JSON]:
    return [it for it in level.nodes.values() if it["type"] == VRAM_FIT]


def model_of(level: Level, node_id: int, slot: int = 0) -> tuple[str, int]:
    """Type and slot of the node that an input comes from."""
    (link,) = (it for it in level.links() if (it.target, it.target_slot) == (node_id, slot))
    return level.nodes[link.origin]["type"], link.origin_slot


def test_it_comes_between_a_loader_and_its_sampler() -> None:
    workflow = graph([loader(1), sampler(2)], [(1, 0, 2, 0, "MODEL")])
    before = copy.deepcopy(workflow)
    (made,) = insert_vram_fit(workflow, budget="6")
    level = Level(workflow)
    assert model_of(level, 2) == (VRAM_FIT, 0)
    assert model_of(level, made["id"]) == ("UNETLoader", 0)
    assert made["widgets_values"] == ["6"]
    assert (workflow["last_node_id"], workflow["last_link_id"]) == (3, 2)
    assert [it["id"] for it in workflow["nodes"]] == [1, 2, 3]
    assert workflow["nodes"][1] == before["nodes"][1], "the sampler has the same link as before"
    links_agree(workflow)


def test_all_samplers_of_one_model_share_it() -> None:
    nodes = [loader(1), sampler(2), sampler(3)]
    workflow = graph(nodes, [(1, 0, 2, 0, "MODEL"), (1, 0, 3, 0, "MODEL")])
    assert len(insert_vram_fit(workflow)) == 1
    assert model_of(Level(workflow), 2) == model_of(Level(workflow), 3) == (VRAM_FIT, 0)
    links_agree(workflow)


def test_two_experts_share_it() -> None:
    """In the order in which they run, whatever the order of the file."""
    nodes = [sampler(4), sampler(3), loader(2), loader(1)]
    links = [(1, 0, 3, 0, "MODEL"), (2, 0, 4, 0, "MODEL"), (3, 0, 4, 1, "LATENT")]
    workflow = graph(nodes, links)
    (made,) = insert_vram_fit(workflow)
    level = Level(workflow)
    assert [model_of(level, it) for it in (3, 4)] == [(VRAM_FIT, 0), (VRAM_FIT, 1)]
    assert [next(link.origin for link in level.links() if link.id == it["link"]) for it in made["inputs"][:2]] == [1, 2]
    links_agree(workflow)


def test_guiders_get_it_and_schedulers_do_not() -> None:
    guided = [("guider", "GUIDER"), ("latent_image", "LATENT")]
    nodes = [
        loader(1),
        loader(2),
        *(node(number, "CFGGuider", [("model", "MODEL")], ["GUIDER"]) for number in (3, 4)),
        node(5, "BasicScheduler", [("model", "MODEL")], ["SIGMAS"]),
        *(node(number, "SamplerCustomAdvanced", guided, ["LATENT"]) for number in (6, 7)),
    ]
    links = [(1, 0, 3, 0, "MODEL"), (2, 0, 4, 0, "MODEL"), (1, 0, 5, 0, "MODEL")]
    links += [(3, 0, 6, 0, "GUIDER"), (4, 0, 7, 0, "GUIDER"), (6, 0, 7, 1, "LATENT")]
    workflow = graph(nodes, links)
    assert len(insert_vram_fit(workflow)) == 1
    level = Level(workflow)
    assert [model_of(level, it) for it in (3, 4, 5)] == [(VRAM_FIT, 0), (VRAM_FIT, 1), ("UNETLoader", 0)]
    links_agree(workflow)


def test_a_model_that_is_made_of_a_sampled_clip_gets_its_own() -> None:
    """One node for both would wait for itself."""
    extend = node(3, "Extend", [("model", "MODEL"), ("latent", "LATENT")], ["MODEL"])
    links = [(1, 0, 2, 0, "MODEL"), (1, 0, 3, 0, "MODEL"), (2, 0, 3, 1, "LATENT"), (3, 0, 4, 0, "MODEL")]
    workflow = graph([loader(1), sampler(2), extend, sampler(4)], [*links, (2, 0, 4, 1, "LATENT")])
    assert len(insert_vram_fit(workflow)) == 2
    links_agree(workflow)


def test_models_of_unrelated_clips_get_their_own() -> None:
    nodes = [loader(1), loader(2), sampler(3), sampler(4)]
    workflow = graph(nodes, [(1, 0, 3, 0, "MODEL"), (2, 0, 4, 0, "MODEL")])
    assert len(insert_vram_fit(workflow)) == 2


def test_it_is_bypassed_with_its_sampler() -> None:
    workflow = graph([loader(1, mode=4), sampler(2, mode=4)], [(1, 0, 2, 0, "MODEL")])
    assert insert_vram_fit(workflow)[0]["mode"] == 4


def test_a_second_time_changes_nothing() -> None:
    workflow = graph([loader(1), sampler(2)], [(1, 0, 2, 0, "MODEL")])
    insert_vram_fit(workflow)
    once = copy.deepcopy(workflow)
    assert insert_vram_fit(workflow) == []
    assert workflow == once


def test_a_way_over_the_canvas_is_left_by_a_link_that_moves() -> None:
    workflow = graph([loader(1), sampler(2)], [(1, 0, 2, 0, "MODEL")])
    workflow["extra"] = {"linkExtensions": [{"id": 1, "parentId": 1}], "reroutes": [{"id": 1, "linkIds": [1]}]}
    insert_vram_fit(workflow)
    assert workflow["extra"] == {"linkExtensions": [], "reroutes": [{"id": 1, "linkIds": []}]}


def test_it_goes_into_a_subgraph_that_loads_a_model() -> None:
    inner = subgraph("inner", [loader(5), sampler(6)], [(5, 0, 6, 0, "MODEL")], link_ids=[8])
    workflow = graph([node(1, "inner", [], ["LATENT"])], [], definitions=[inner])
    (made,) = insert_vram_fit(workflow)
    assert made["id"] == 7, "no other node of the file has it"
    assert Level(inner).nodes[7] is made
    assert workflow["last_node_id"] == inner["state"]["lastNodeId"] == 7
    assert workflow["last_link_id"] == inner["state"]["lastLinkId"] == 9
    links_agree(workflow)


def test_a_subgraph_that_is_handed_a_model_gets_a_fitted_one() -> None:
    inner = subgraph("inner", [sampler(6)], [(INPUTS, 0, 6, 0, "MODEL")], [("model", "MODEL")])
    nodes = [loader(1), node(2, "inner", [("model", "MODEL")], ["IMAGE"]), sampler(3)]
    workflow = graph(nodes, [(1, 0, 2, 0, "MODEL"), (1, 0, 3, 0, "MODEL")], definitions=[inner])
    assert len(insert_vram_fit(workflow)) == 1
    first, second = levels(workflow)
    assert model_of(first, 2) == model_of(first, 3) == (VRAM_FIT, 0)
    assert fits(second) == []
    links_agree(workflow)


def test_it_overlaps_nothing() -> None:
    """Beside the loader where there is room, else as near as can be, and not over a group's border."""
    free = graph([loader(1, pos=[0, 0]), sampler(2, pos=[900, 0])], [(1, 0, 2, 0, "MODEL")])
    (made,) = insert_vram_fit(free)
    assert 200 <= made["pos"][0] <= 300
    assert abs(made["pos"][1]) < 60

    nodes = [loader(1, pos=[0, 0]), *(sampler(it, pos=[240 * (it - 1), 0]) for it in range(2, 9))]
    crowded = graph(nodes, [(1, 0, 2, 0, "MODEL")])
    crowded["groups"] = [{"bounding": [-40, -80, 700, 400]}]
    (made,) = insert_vram_fit(crowded)
    others = [node_box(it) for it in crowded["nodes"] if it is not made]
    assert not any(node_box(made).overlaps(other) for other in others)
    group = node_box({"pos": [-40, -50], "size": [700, 370]})
    assert group.contains(node_box(made)) or not group.overlaps(node_box(made))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "Expecting value"),
        ('{"1": {"class_type": "KSampler"}}', "page has saved"),
        ("{}", "page has saved"),
        ('{"nodes": [{}], "links": []}', "it is damaged"),
    ],
)
def test_the_script_refuses_other_files(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "graph.json"
    file.write_text(content, "utf-8")
    run = script(file)
    assert run.returncode == 1
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_the_script_writes_beside_the_file(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph([loader(1), sampler(2)], [(1, 0, 2, 0, "MODEL")])), "utf-8")
    assert script(file, "--budget", "6GiB").returncode == 0
    written = json.loads((tmp_path / "graph_vram_fit.json").read_text("utf-8"))
    assert fits(Level(written))[0]["widgets_values"] == ["6GiB"]
    assert script(tmp_path / "graph_vram_fit.json").returncode == 1, "there is nothing left to insert"


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, PACK / "scripts" / "insert_vram_fit.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
