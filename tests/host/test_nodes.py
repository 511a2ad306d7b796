"""The nodes as the host describes them: complete, described, and unchanged since workflows were saved with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NODES = (
    "I2VLoader",
    "I2VVRAMBudget",
    "I2VEncode",
    "I2VChunkedSampler",
    "I2VVAETiledDecode",
    "I2VSaveVideo",
    "I2VSaveLatent",
    "I2VLoadLatent",
    "I2VMemoryReport",
    "I2VBatch",
    "I2VVRAMFit",
)
SURFACE = Path(__file__).with_name("surface.json")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def inputs_of(node: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(section, name, type, options) of every input that a person can set or connect."""
    for section in ("required", "optional"):
        for name, (kind, *options) in node["input"].get(section, {}).items():
            yield section, name, kind, options[0] if options else {}


def surface_of(node: dict[str, Any]) -> dict[str, Any]:
    """Everything that a saved workflow depends on: names, types, order, defaults, limits and choices."""
    kept = ("default", "min", "max", "step", "options", "control_after_generate", "multiline")
    inputs = {
        name: {"section": section, "type": kind, **{key: options[key] for key in kept if key in options}}
        for section, name, kind, options in inputs_of(node)
    }
    for name in {"I2VLoader": ["model"], "I2VLoadLatent": ["file"]}.get(node["name"], []):
        inputs[name]["options"] = inputs[name]["options"][:1]  # the others are the user's own
    outputs = [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)]
    return {"inputs": inputs, "outputs": outputs, "output_node": node["output_node"]}


def test_the_host_has_these_nodes_of_this_pack_and_no_others(object_info: dict[str, Any]) -> None:
    own = {name for name, node in object_info.items() if node["python_module"] == "custom_nodes.i2v_budget"}
    assert own == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_described(object_info: dict[str, Any], name: str) -> None:
    node = object_info[name]
    assert node["category"] == "image to video/I2V Budget"
    assert len(node["description"]) > 40
    assert len(node["search_aliases"]) >= 3
    assert len(node["output_tooltips"]) == len(node["output"])
    assert all(node["output_tooltips"])


@pytest.mark.parametrize("name", NODES)
def test_every_input_has_a_tooltip_and_every_widget_says_its_default(object_info: dict[str, Any], name: str) -> None:
    for _, input_name, kind, options in inputs_of(object_info[name]):
        tooltip = options.get("tooltip", "")
        assert len(tooltip) > 15, input_name
        if kind in WIDGETS:
            assert "Default" in tooltip, input_name


@pytest.mark.parametrize(("name", "units"), [("I2VVRAMBudget", {"width": "pixels", "height": "pixels"})])
def test_sizes_say_their_unit(object_info: dict[str, Any], name: str, units: dict[str, str]) -> None:
    for _, input_name, _, options in inputs_of(object_info[name]):
        assert units.get(input_name, "") in options["tooltip"]


def test_the_surface_is_the_one_that_workflows_were_saved_with(object_info: dict[str, Any]) -> None:
    """A change here breaks users' saved workflows: only ever add, at the end, with a default that changes nothing."""
    assert {name: surface_of(object_info[name]) for name in NODES} == json.loads(SURFACE.read_text("utf-8"))
