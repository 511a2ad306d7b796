"""Workflow files become the prompts that the page would have made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from comfy_host.workflow import WorkflowError, to_prompt, widgets

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


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(node(4, "Nobody", []), r"Node 4 \(Nobody\) is not known"), (node(5, "Load", [], mode=4), "is bypassed")],
)
def test_what_cannot_be_a_prompt_is_refused(broken: dict[str, Any], reason: str) -> None:
    with pytest.raises(WorkflowError, match=reason):
        to_prompt(workflow(broken), OBJECT_INFO)
