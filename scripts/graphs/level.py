"""The graphs in a workflow file: the one that the page shows first, and the definitions of its subgraphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]
"""A part of a workflow file."""

INPUTS, OUTPUTS = -10, -20
"""Ids of the two places in a subgraph where its own inputs come in and its outputs leave."""


@dataclass(frozen=True, slots=True)
class Link:
    """From an output slot of a node to an input slot of another."""

    id: int
    origin: int
    origin_slot: int
    target: int
    target_slot: int
    kind: str


class Level:
    """One graph of a file, edited in place."""

    def __init__(self, graph: JSON) -> None:
        self.graph = graph
        self.nodes: dict[int, JSON] = {node["id"]: node for node in graph["nodes"]}

    def links(self) -> Iterator[Link]:
        for link in self.graph["links"]:
            if isinstance(link, list):  # as the page's first graph has them
                yield Link(*link[:6])
            else:
                origin, target = (link["origin_id"], link["origin_slot"]), (link["target_id"], link["target_slot"])
                yield Link(link["id"], *origin, *target, link["type"])

    def add_node(self, node: JSON) -> None:
        self.nodes[node["id"]] = node
        self.graph["nodes"].append(node)

    def add_link(self, link: Link) -> None:
        """Add a link, which both of its ends are told."""
        if self._has_objects:
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
            values = (link.id, link.origin, link.origin_slot, link.target, link.target_slot, link.kind)
            self.graph["links"].append(dict(zip(names, values, strict=True)))
        else:
            values = [link.id, link.origin, link.origin_slot, link.target, link.target_slot, link.kind]
            self.graph["links"].append(values)
        self._links_out(link).append(link.id)
        self.nodes[link.target]["inputs"][link.target_slot]["link"] = link.id

    def remove_link(self, link: Link) -> None:
        """Remove a link, its two ends, and its way over the canvas."""
        ids = [it.id for it in self.links()]
        del self.graph["links"][ids.index(link.id)]
        self._links_out(link).remove(link.id)
        self.nodes[link.target]["inputs"][link.target_slot]["link"] = None
        extra = self.graph.get("extra") or {}
        for reroute in (*extra.get("reroutes", ()), *self.graph.get("reroutes", ())):
            if link.id in reroute.get("linkIds", ()):
                reroute["linkIds"].remove(link.id)
        if "linkExtensions" in extra:
            extra["linkExtensions"] = [it for it in extra["linkExtensions"] if it["id"] != link.id]

    @property
    def _has_objects(self) -> bool:
        """Whether links are objects, as in subgraphs."""
        return "inputNode" in self.graph or any(isinstance(link, dict) for link in self.graph["links"])

    def _links_out(self, link: Link) -> list[int]:
        """Ids of the links that leave the slot from which a link comes."""
        if link.origin == INPUTS:
            return self.graph["inputs"][link.origin_slot]["linkIds"]
        slot = self.nodes[link.origin]["outputs"][link.origin_slot]
        if slot.get("links") is None:
            slot["links"] = []
        return slot["links"]


def subgraphs(workflow: JSON) -> list[JSON]:
    return (workflow.get("definitions") or {}).get("subgraphs", [])


def levels(workflow: JSON) -> list[Level]:
    """All graphs of a file, that of the page first."""
    return [Level(workflow), *map(Level, subgraphs(workflow))]


class Ids:
    """Gives ids to new nodes and links that nothing in a file has, and notes them where the page looks."""

    def __init__(self, workflow: JSON) -> None:
        self._workflow = workflow
        graphs = levels(workflow)
        self._node = max((node for level in graphs for node in level.nodes if isinstance(node, int)), default=0)
        self._link = max((link.id for level in graphs for link in level.links()), default=0)
        states = [level.graph.get("state") or {} for level in graphs]
        self._node = max(self._node, workflow.get("last_node_id", 0), *(it.get("lastNodeId", 0) for it in states))
        self._link = max(self._link, workflow.get("last_link_id", 0), *(it.get("lastLinkId", 0) for it in states))

    def node(self, level: Level) -> int:
        self._node += 1
        self._note(level, "last_node_id", "lastNodeId", self._node)
        return self._node

    def link(self, level: Level) -> int:
        self._link += 1
        self._note(level, "last_link_id", "lastLinkId", self._link)
        return self._link

    def _note(self, level: Level, name: str, state_name: str, value: int) -> None:
        if name in self._workflow:
            self._workflow[name] = value
        for graph in (self._workflow, level.graph):
            if "state" in graph:
                graph["state"][state_name] = value
