"""Small workflow files for tests, and checks that both ends of every link know it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from graphs.level import INPUTS, JSON, OUTPUTS, Level, levels

Slots = Sequence[tuple[str, str]]
Ends = tuple[int, int, int, int, str]
"""Of a link: from a node's output slot to a node's input slot, and its type."""


def node(number: int, kind: str, inputs: Slots, outputs: Sequence[str], **more: Any) -> JSON:
    return {
        "id": number,
        "type": kind,
        "pos": [300 * number, 0],
        "size": [210, 100],
        "mode": 0,
        "inputs": [{"name": name, "type": type_, "link": None} for name, type_ in inputs],
        "outputs": [{"name": type_, "type": type_, "links": []} for type_ in outputs],
        "widgets_values": [],
        **more,
    }


def graph(nodes: list[JSON], links: Sequence[Ends], *, definitions: Sequence[JSON] = ()) -> JSON:
    """A workflow file."""
    listed = [[number, *ends] for number, ends in enumerate(links, 1)]
    made: JSON = {"version": 0.4, "nodes": nodes, "links": listed, "groups": []}
    made["last_node_id"] = max(it["id"] for it in nodes)
    made["last_link_id"] = len(links)
    if definitions:
        made["definitions"] = {"subgraphs": list(definitions)}
    _tell_ends(made)
    return made


def subgraph(
    name: str, nodes: list[JSON], links: Sequence[Ends], inputs: Slots = (), link_ids: Sequence[int] | None = None
) -> JSON:
    """The definition of a subgraph."""
    names = ("origin_id", "origin_slot", "target_id", "target_slot", "type")
    ids = link_ids or range(101, 101 + len(links))
    objects = [{"id": it, **dict(zip(names, ends, strict=True))} for it, ends in zip(ids, links, strict=True)]
    made: JSON = {"id": name, "nodes": nodes, "links": objects, "groups": [], "outputs": []}
    made["inputs"] = [{"name": it, "type": type_, "linkIds": []} for it, type_ in inputs]
    made["inputNode"] = {"id": INPUTS, "bounding": [-200, 0, 100, 60]}
    made["outputNode"] = {"id": OUTPUTS, "bounding": [4000, 0, 100, 60]}
    made["state"] = {"lastNodeId": max(it["id"] for it in nodes), "lastLinkId": max(ids, default=0)}
    _tell_ends(made)
    return made


def _tell_ends(made: JSON) -> None:
    """Note links at both of their ends."""
    (level, *_) = levels(made)
    for link in level.links():
        if link.origin == INPUTS:
            made["inputs"][link.origin_slot]["linkIds"].append(link.id)
        else:
            level.nodes[link.origin]["outputs"][link.origin_slot]["links"].append(link.id)
        if link.target != OUTPUTS:
            level.nodes[link.target]["inputs"][link.target_slot]["link"] = link.id


def loose_ends(workflow: JSON) -> list[tuple[str, str]]:
    """Slots that know other links than there are, by the type of the node and their name."""
    return [slot for level in levels(workflow) for slot in _loose_ends(level)]


def _loose_ends(level: Level) -> Iterator[tuple[str, str]]:
    into, out = {}, {}
    for link in level.links():
        into[link.target, link.target_slot] = link.id
        out.setdefault((link.origin, link.origin_slot), set()).add(link.id)
    for it in level.nodes.values():
        for place, slot in enumerate(it.get("inputs") or ()):
            if slot.get("link") != into.get((it["id"], place)):
                yield it["type"], slot["name"]
        for place, slot in enumerate(it.get("outputs") or ()):
            if set(slot.get("links") or ()) != out.get((it["id"], place), set()):
                yield it["type"], slot["name"]
    for place, slot in enumerate(level.graph.get("inputs") or ()):
        if set(slot["linkIds"] or ()) != out.get((INPUTS, place), set()):
            yield "subgraph", slot["name"]


def links_agree(workflow: JSON) -> None:
    """Assert that both ends of every link know it, and that its id and the nodes' are counted."""
    assert loose_ends(workflow) == []
    ids = [link.id for level in levels(workflow) for link in level.links()]
    assert len(set(ids)) == len(ids)
    assert workflow["last_link_id"] == max(ids)
    assert workflow["last_node_id"] == max(node for level in levels(workflow) for node in level.nodes)
