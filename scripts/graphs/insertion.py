"""Puts VRAM Fit between the samplers of a workflow and their models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .level import JSON, Ids, Level, Link, subgraphs
from .placing import free_place

VRAM_FIT = "I2VVRAMFit"
SIZE_PIXELS = (320, 220)
"""Size of the node, with room for its report below the widget."""
_ONLY_SCALES = {"AddNoise"}
"""Nodes that take a model and give a latent, but do not run the model."""


@dataclass(slots=True, eq=False)
class ModelSource:
    """An output slot that gives samplers or guiders their model."""

    node: int
    slot: int
    links: list[Link] = field(default_factory=list)
    """To the samplers and guiders."""
    samplers: set[int] = field(default_factory=set)
    """Nodes that run the model: samplers, and of guiders those to which they go."""

    @property
    def users(self) -> set[int]:
        return {link.target for link in self.links}


def insert_vram_fit(workflow: JSON, *, budget: str = "auto") -> list[JSON]:
    """Insert VRAM Fit before every sampler and guider of a workflow file, in place; returns the new nodes.

    One node serves two models that sample one latent after another, such as Wan 2.2's two experts. Samplers that have
    a VRAM Fit before them keep it. A subgraph that is handed a model gets a fitted one.
    """
    ids = Ids(workflow)
    inner = {graph["id"]: Level(graph) for graph in subgraphs(workflow)}
    pairs = [(level, pair) for level in (Level(workflow), *inner.values()) for pair in _pairs(level, inner)]
    return [_insert(level, ids, pair, budget) for level, pair in pairs]


def model_inputs(node: JSON, inner: dict[str, Level]) -> set[str]:
    """Names of the inputs from which a sampler, a guider, or those in a subgraph, get their models.

    Args:
        node: a node; samplers and guiders are those that take a model, and give a latent or a guider.
        inner: the subgraphs by their ids.
    """
    if node["type"] in inner:
        level = inner[node["type"]]
        targets = {link.id: (level.nodes.get(link.target), link.target_slot) for link in level.links()}
        return {
            slot["name"]
            for slot in level.graph["inputs"]
            for target, place in (targets[link] for link in slot["linkIds"] or () if link in targets)
            if target is not None and target["inputs"][place]["name"] in model_inputs(target, inner)
        }
    kinds = {slot["type"] for slot in node.get("outputs") or ()}
    if "MODEL" in kinds or not kinds & {"LATENT", "GUIDER"} or node["type"] in _ONLY_SCALES:
        return set()
    return {slot["name"] for slot in node.get("inputs") or () if slot["type"] == "MODEL"}


def _sources(level: Level, inner: dict[str, Level]) -> list[ModelSource]:
    """The outputs from which samplers and guiders get their models, in the order in which these run."""
    found: dict[tuple[int, int], ModelSource] = {}
    links = {link.id: link for link in level.links()}
    for node in level.nodes.values():
        names = model_inputs(node, inner)
        for slot in node.get("inputs") or ():
            link = links.get(slot.get("link"))
            if slot["name"] not in names or link is None or not _can_be_fitted(level, link):
                continue
            source = found.setdefault((link.origin, link.origin_slot), ModelSource(link.origin, link.origin_slot))
            source.links.append(link)
            guided = {it.target for it in links.values() if it.kind == "GUIDER" and it.origin == node["id"]}
            source.samplers |= guided or {node["id"]}
    depths = {node: len(_upstream(level, {node})) for node in level.nodes}
    return sorted(found.values(), key=lambda it: min(depths.get(sampler, 0) for sampler in it.samplers))


def _can_be_fitted(level: Level, link: Link) -> bool:
    """Whether a model comes from a node of this graph, not from outside, and has no VRAM Fit yet."""
    origin = level.nodes.get(link.origin)
    return origin is not None and origin["type"] != VRAM_FIT


def _pairs(level: Level, inner: dict[str, Level]) -> Iterator[list[ModelSource]]:
    """Sources that share a node: one, or two."""
    rest = _sources(level, inner)
    while rest:
        first = rest.pop(0)
        second = next((it for it in rest if _belong_together(level, first, it)), None)
        if second is not None:
            rest.remove(second)
        yield [first] if second is None else [first, second]


def _belong_together(level: Level, first: ModelSource, second: ModelSource) -> bool:
    """Whether two models sample one latent, at the same time or one after another."""
    if _mode(level, first) != _mode(level, second):
        return False
    if any(_upstream(level, {a.node}) & b.users for a, b in ((first, second), (second, first))):
        return False  # a model is made of what the other one's sampler gives
    return bool(second.samplers & first.samplers or _upstream(level, second.samplers, "LATENT") & first.samplers)


def _upstream(level: Level, nodes: set[int], kind: str | None = None) -> set[int]:
    """The nodes, and all from which they get something; of a kind, if one is named."""
    origins: dict[int, set[int]] = {}
    for link in level.links():
        if kind in (None, link.kind):
            origins.setdefault(link.target, set()).add(link.origin)
    found, waiting = set(nodes), list(nodes)
    while waiting:
        new = origins.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


def _mode(level: Level, source: ModelSource) -> int:
    """The mode of a source's users; 0, as of nodes that run, where they differ."""
    modes = {level.nodes[user].get("mode", 0) for user in source.users}
    return modes.pop() if len(modes) == 1 else 0


def _insert(level: Level, ids: Ids, sources: list[ModelSource], budget: str) -> JSON:
    first = sources[0]
    node = {
        "id": ids.node(level),
        "type": VRAM_FIT,
        "pos": list(free_place(level, SIZE_PIXELS, level.nodes[first.node])),
        "size": list(SIZE_PIXELS),
        "flags": {},
        "order": len(level.nodes),
        "mode": _mode(level, first),
        "inputs": [
            {"name": "model", "type": "MODEL", "link": None},
            {"name": "model_2", "type": "MODEL", "link": None, "shape": 7},
            {"name": "vae", "type": "VAE", "link": None, "shape": 7},
        ],
        "outputs": [
            {"name": name, "type": kind, "links": []}
            for name, kind in (("model", "MODEL"), ("model_2", "MODEL"), ("vae", "VAE"), ("report", "STRING"))
        ],
        "properties": {"Node name for S&R": VRAM_FIT},
        "widgets_values": [budget],
    }
    level.add_node(node)
    for place, source in enumerate(sources):
        for link in source.links:
            level.remove_link(link)
            level.add_link(Link(link.id, node["id"], place, link.target, link.target_slot, "MODEL"))
        level.add_link(Link(ids.link(level), source.node, source.slot, node["id"], place, "MODEL"))
    return node
