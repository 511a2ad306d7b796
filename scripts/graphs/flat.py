"""The nodes of a workflow that the host runs, as the page finds them: no subgraphs, bypassed nodes and reroutes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from .level import INPUTS, JSON, Level, Link, subgraphs

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
_REROUTE, _PRIMITIVE = "Reroute", "PrimitiveNode"
ONLY_ON_PAGE = NOTES | {_REROUTE, _PRIMITIVE}
"""Node types that exist on the page only."""


@dataclass(frozen=True, slots=True)
class Output:
    """An output slot of a node that runs."""

    node: str
    slot: int


@dataclass(frozen=True, slots=True)
class Value:
    """A value that a widget of a subgraph, or a primitive node, gives."""

    value: Any


@dataclass(frozen=True, slots=True)
class WidgetOf:
    """The value of a node's widget, which a subgraph shows on the node in its place and hands to others too."""

    node: JSON
    name: str


Origin: TypeAlias = "Output | Value | WidgetOf | None"
"""Source of an input's value; None: it has none."""


@dataclass(frozen=True, slots=True)
class FlatNode:
    """A node that the host runs."""

    id: str
    """Its own id; for a node in a subgraph, after those of the nodes around it, as `12:5`."""
    node: JSON
    origins: dict[str, Output | Value | WidgetOf] = field(default_factory=dict)
    """By the name of an input: what it gets in place of its widget's value."""


def flat_nodes(workflow: JSON) -> Iterator[FlatNode]:
    """The nodes of a workflow file that the host runs, in the file's order."""
    definitions = {graph["id"]: graph for graph in subgraphs(workflow)}
    yield from _Scope(Level(workflow), definitions).nodes()


class _Scope:
    """A graph as it is used in one place: the first one, or a subgraph in the place of a node."""

    def __init__(
        self, level: Level, definitions: dict[str, JSON], outer: _Scope | None = None, stand_in: JSON | None = None
    ) -> None:
        self._level, self._definitions = level, definitions
        self._outer, self._stand_in = outer, stand_in
        self._links: dict[int, Link] = {link.id: link for link in level.links()}
        self._prefix: str = f"{outer._prefix}{stand_in['id']}:" if outer and stand_in else ""

    def nodes(self) -> Iterator[FlatNode]:
        for node in self._level.nodes.values():
            if node["type"] in ONLY_ON_PAGE or node.get("mode", 0) in (MUTED, BYPASSED):
                continue
            if node["type"] in self._definitions:
                yield from self._inside(node).nodes()
                continue
            origins = {slot["name"]: self._origin(slot.get("link")) for slot in node.get("inputs") or ()}
            given = {name: origin for name, origin in origins.items() if origin is not None}
            yield FlatNode(f"{self._prefix}{node['id']}", node, given)

    def _inside(self, node: JSON) -> _Scope:
        """The subgraph that a node stands for."""
        return _Scope(Level(self._definitions[node["type"]]), self._definitions, self, node)

    def _origin(self, link_id: int | None) -> Origin:
        link = self._links.get(link_id) if link_id is not None else None
        if link is None:
            return None
        if link.origin == INPUTS:
            return self._from_outside(link.origin_slot)
        return self._from(self._level.nodes[link.origin], link.origin_slot)

    def _from(self, node: JSON, slot: int) -> Origin:
        """The origin that a node's output slot stands for."""
        mode = node.get("mode", 0)
        if mode in (MUTED, BYPASSED):
            return None if mode == MUTED else self._past(node, slot)
        if node["type"] == _PRIMITIVE:
            return Value(node["widgets_values"][0])
        if node["type"] == _REROUTE:
            return self._origin(node["inputs"][0].get("link"))
        if node["type"] in self._definitions:
            inner = self._inside(node)
            ends = inner._level.graph["outputs"][slot]["linkIds"]
            return inner._origin(ends[0] if ends else None)
        return Output(f"{self._prefix}{node['id']}", slot)

    def _past(self, node: JSON, output: int) -> Origin:
        """The input that a bypassed node passes on: that at the output's place, or the first of its type."""
        inputs = node.get("inputs") or []
        kind = node["outputs"][output]["type"]
        places = (*inputs[output : output + 1], *inputs)
        return self._origin(next((slot.get("link") for slot in places if slot["type"] == kind), None))

    def _from_outside(self, slot: int) -> Origin:
        """The origin of a subgraph's own input: a link to the node that stands for it, or that node's widget."""
        assert self._outer is not None
        assert self._stand_in is not None
        name = self._level.graph["inputs"][slot]["name"]
        outside = {it["name"]: it for it in self._stand_in.get("inputs") or ()}.get(name)
        if outside is not None and outside.get("link") is not None:
            return self._outer._origin(outside["link"])
        return self._promoted().get(name) or self._inner_widget(name)

    def _promoted(self) -> dict[str, Value]:
        """Values of the widgets on the node that stands for a subgraph; some pages keep them in the inner nodes."""
        assert self._stand_in is not None
        values = self._stand_in.get("widgets_values") or []
        pairs = self._stand_in.get("properties", {}).get("proxyWidgets")
        names = self._widget_inputs() if not pairs else [widget for node, widget in pairs if node == "-1"]
        return {name: Value(value) for name, value in zip(names, values, strict=False)}

    def _widget_inputs(self) -> list[str]:
        """Names of the subgraph's inputs that are widgets of nodes in it."""
        names = (it["name"] for it in self._level.graph["inputs"])
        return [name for name in names if self._inner_widget(name) is not None]

    def _inner_widget(self, name: str) -> WidgetOf | None:
        """The widget of a node in the subgraph that one of the subgraph's inputs stands for."""
        (slot,) = (it for it in self._level.graph["inputs"] if it["name"] == name)
        for link in (self._links[it] for it in slot["linkIds"]):
            target = self._level.nodes.get(link.target)
            inner = target["inputs"][link.target_slot] if target is not None else {}
            if target is not None and target["type"] in self._definitions:  # a subgraph in the subgraph
                found = self._inside(target)._inner_widget(inner["name"])
            else:
                found = WidgetOf(target, inner["widget"]["name"]) if target is not None and "widget" in inner else None
            if found is not None:
                return found
        return None
