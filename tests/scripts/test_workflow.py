"""Workflow files become the prompts that the page would have made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from comfy_host.workflow import WorkflowError, to_prompt, widgets
from graphs.flat import Output, Value, WidgetOf, flat_nodes
from graphs.level import INPUTS, OUTPUTS

from . import graph_parts as parts

PICTURE = ["COMBO", {"options": ["a.png", "b.png"], "image_upload": True}]
CODEC = [
    "COMFY_DYNAMICCOMBO_V3",
    {
        "options": [
            {"key": "auto", "inputs": {"required": {}}},
            {"key": "h264", "inputs": {"required": {"crf": ["FLOAT", {"default": 23.0}]}, "optional": {}}},
        ]
    },
]
OBJECT_INFO: dict[str, Any] = {
    "Load": {"input": {"required": {"image": PICTURE}}},
    "Sample": {
        "input": {
            "required": {
                "image": ["IMAGE"],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "method": [["euler", "ddim"], {}],
                "size": ["INT", {"default": 8, "forceInput": True}],
            },
            "optional": {"mask": ["MASK"], "bits": ["INT", {"default": 8}]},
        }
    },
    "Save": {"input": {"required": {"image": ["IMAGE"], "codec": CODEC, "name": ["STRING", {"default": "x"}]}}},
}


def node(
    number: int, kind: str, values: list[Any], links: Mapping[str, int | None] | None = None, **more: Any
) -> dict[str, Any]:
    inputs = [{"name": name, "type": "*", "link": link} for name, link in (links or {}).items()]
    return {"id": number, "type": kind, "widgets_values": values, "inputs": inputs, **more}


def workflow(*nodes: dict[str, Any], links: tuple[tuple[int, int, int, int, int, str], ...] = ()) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": [list(link) for link in links], "version": 0.4}


def test_values_and_links_become_inputs() -> None:
    prompt = to_prompt(
        workflow(
            node(1, "Load", ["b.png", "image"]),
            node(2, "Sample", [7, "randomize", 5, "ddim", 10], {"image": 11, "mask": None}, title="My sampler"),
            node(3, "Save", ["auto", "film"], {"image": 12}),
            links=((11, 1, 0, 2, 0, "IMAGE"), (12, 2, 1, 3, 0, "IMAGE")),
        ),
        OBJECT_INFO,
    )
    assert prompt["1"] == {"class_type": "Load", "inputs": {"image": "b.png"}, "_meta": {"title": "Load"}}
    assert prompt["2"] == {
        "class_type": "Sample",
        "inputs": {"seed": 7, "steps": 5, "method": "ddim", "bits": 10, "image": ["1", 0]},
        "_meta": {"title": "My sampler"},
    }
    assert prompt["3"]["inputs"] == {"codec": "auto", "name": "film", "image": ["2", 1]}


def test_a_linked_widget_takes_the_link() -> None:
    prompt = to_prompt(
        workflow(
            node(1, "Sample", [7, "fixed", 5, "ddim", 8]),
            node(2, "Sample", [7, "fixed", 5, "ddim", 8], {"steps": 3}),
            links=((3, 1, 0, 2, 0, "INT"),),
        ),
        OBJECT_INFO,
    )
    assert prompt["2"]["inputs"]["steps"] == ["1", 0]
    assert prompt["2"]["inputs"]["method"] == "ddim"


@pytest.mark.parametrize(
    ("values", "inputs"),
    [
        (["auto", "film"], {"codec": "auto", "name": "film"}),
        (["h264", 18.0, "film"], {"codec": "h264", "codec.crf": 18.0, "name": "film"}),
    ],
)
def test_the_chosen_option_brings_its_own_widgets(values: list[Any], inputs: dict[str, Any]) -> None:
    assert to_prompt(workflow(node(1, "Save", values)), OBJECT_INFO)["1"]["inputs"] == inputs


def test_widgets_that_a_file_does_not_know_yet_take_their_defaults() -> None:
    inputs = to_prompt(workflow(node(1, "Sample", [7, "fixed", 5])), OBJECT_INFO)["1"]["inputs"]
    assert inputs == {"seed": 7, "steps": 5, "method": "euler", "bits": 8}


def test_an_input_named_seed_has_a_control_unless_its_node_says_otherwise() -> None:
    def names(**options: Any) -> list[str | None]:
        info = {"input": {"required": {"seed": ["INT", {"default": 0, **options}]}}}
        return [name for name, _ in widgets(info, [])]

    assert names() == ["seed", None]
    assert names(control_after_generate=False) == ["seed"]


def test_notes_and_muted_nodes_stay_on_the_page() -> None:
    prompt = to_prompt(
        workflow(
            node(1, "Load", ["a.png", "image"], mode=2),
            node(2, "Save", ["auto", "x"], {"image": 5}),
            {"id": 3, "type": "MarkdownNote", "widgets_values": ["hello"]},
            links=((5, 1, 0, 2, 0, "IMAGE"),),
        ),
        OBJECT_INFO,
    )
    assert set(prompt) == {"2"}
    assert "image" not in prompt["2"]["inputs"]


def test_an_unknown_node_is_refused() -> None:
    with pytest.raises(WorkflowError, match=r"Node 4 \(Nobody\) is not known"):
        to_prompt(workflow(node(4, "Nobody", [])), OBJECT_INFO)


def test_a_multitype_input_with_a_widget_has_its_value() -> None:
    spec = ["FLOAT,INT", {"widgetType": "FLOAT", "default": 25.0}]
    info = {"input": {"required": {"rate": spec, "color": ["COLOR", {}], "image": ["IMAGE"]}}}
    assert widgets(info, [24, "#000000"]) == [("rate", 24), ("color", "#000000")]


def test_a_bypassed_node_passes_on_what_it_gets_of_the_same_type() -> None:
    bypassed = parts.node(2, "Scale", [("mask", "MASK"), ("image", "IMAGE")], ["IMAGE"], mode=4)
    nodes = [parts.node(1, "Load", [], ["IMAGE"]), bypassed, parts.node(3, "Save", [("image", "IMAGE")], [])]
    flat = flatten(parts.graph(nodes, [(1, 0, 2, 1, "IMAGE"), (2, 0, 3, 0, "IMAGE")]))
    assert flat == {"1": {}, "3": {"image": Output("1", 0)}}


def test_reroutes_and_primitives_are_only_on_the_page() -> None:
    nodes = [
        parts.node(1, "Load", [], ["IMAGE"]),
        parts.node(2, "Reroute", [("", "*")], ["IMAGE"]),
        parts.node(3, "PrimitiveNode", [], ["INT"], widgets_values=[7, "fixed"]),
        parts.node(4, "Save", [("image", "IMAGE"), ("crf", "INT")], []),
    ]
    links = [(1, 0, 2, 0, "IMAGE"), (2, 0, 4, 0, "IMAGE"), (3, 0, 4, 1, "INT")]
    assert flatten(parts.graph(nodes, links)) == {"1": {}, "4": {"image": Output("1", 0), "crf": Value(7)}}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"widgets_values": [9]}, Value(9)),
        ({"widgets_values": [9], "properties": {"proxyWidgets": [["-1", "steps"]]}}, Value(9)),
        ({"properties": {"proxyWidgets": [["5", "steps"]]}}, None),
    ],
    ids=["of the node", "of the node, older pages", "of the inner node"],
)
def test_a_subgraph_becomes_its_nodes(given: dict[str, Any], steps: Value | None) -> None:
    """With what comes in and goes out, and the values that the node in its place shows."""
    inner_node = parts.node(5, "Sample", [("image", "IMAGE"), ("steps", "INT")], ["LATENT"])
    inner_node["inputs"][1]["widget"] = {"name": "steps"}
    links = [(INPUTS, 0, 5, 0, "IMAGE"), (INPUTS, 1, 5, 1, "INT"), (5, 0, OUTPUTS, 0, "LATENT")]
    inner = parts.subgraph("inner", [inner_node], links, [("image", "IMAGE"), ("steps", "INT")])
    inner["outputs"] = [{"name": "latent", "type": "LATENT", "linkIds": [103]}]
    nodes = [
        parts.node(1, "Load", [], ["IMAGE"]),
        parts.node(2, "inner", [("image", "IMAGE"), ("steps", "INT")], ["LATENT"], **given),
        parts.node(3, "Save", [("latent", "LATENT")], []),
    ]
    outer = [(1, 0, 2, 0, "IMAGE"), (2, 0, 3, 0, "LATENT")]
    flat = flatten(parts.graph(nodes, outer, definitions=[inner]))
    sampled = {"image": Output("1", 0), "steps": steps or WidgetOf(inner_node, "steps")}
    assert flat == {"1": {}, "2:5": sampled, "3": {"latent": Output("2:5", 0)}}


def test_a_widget_that_a_subgraph_shows_goes_to_all_that_it_is_linked_to() -> None:
    """Also to an input without a widget."""
    inner = [node(5, "Sample", [7, "fixed", 5], {"steps": None}), node(6, "Sample", [], {"size": None})]
    inner[0]["inputs"][0]["widget"] = {"name": "steps"}
    links = [(INPUTS, 0, 5, 0, "INT"), (INPUTS, 0, 6, 0, "INT")]
    definition = parts.subgraph("inner", [{**it, "outputs": []} for it in inner], links, [("steps", "INT")])
    outer = parts.graph([parts.node(1, "inner", [("steps", "INT")], [])], [], definitions=[definition])
    prompt = to_prompt(outer, OBJECT_INFO)
    assert prompt["1:5"]["inputs"]["steps"] == prompt["1:6"]["inputs"]["size"] == 5


def test_a_muted_subgraph_is_left_out() -> None:
    inner = parts.subgraph("inner", [parts.node(5, "Load", [], ["IMAGE"])], [])
    nodes = [parts.node(1, "inner", [], ["IMAGE"], mode=2), parts.node(2, "Save", [("image", "IMAGE")], [])]
    assert flatten(parts.graph(nodes, [(1, 0, 2, 0, "IMAGE")], definitions=[inner])) == {"2": {}}


def flatten(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Origins of the inputs of each node that runs, by its id."""
    return {it.id: it.origins for it in flat_nodes(made)}
