"""Converts a workflow file, which the page reads and writes, to a prompt, which the host runs.

A workflow (format 0.4) keeps the values of a node's widgets as a list, in the order in which the page draws them. Which
of a node's inputs are widgets, and in which order they are drawn, follows from the host's `/object_info`, as the page
itself does it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from graphs.flat import Output, WidgetOf, flat_nodes
from graphs.level import JSON

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COMFY_DYNAMICCOMBO_V3"}
SEEDS = {"seed", "noise_seed"}
"""Inputs that the page gives a control-after-generate widget unless their node says otherwise."""

UPLOADS = ("image_upload", "video_upload", "audio_upload", "file_upload")


class WorkflowError(ValueError):
    """A workflow that cannot be converted; the message names the node and the problem."""


def to_prompt(workflow: JSON, object_info: dict[str, JSON]) -> JSON:
    """Convert a UI-format workflow to an API-format prompt.

    Args:
        workflow: the content of a workflow file, format 0.4.
        object_info: the host's `/object_info`.

    Raises:
        WorkflowError: the host does not know a node.
    """
    prompt: JSON = {}
    for flat in flat_nodes(workflow):
        node = flat.node
        if node["type"] not in object_info:
            raise WorkflowError(f"Node {flat.id} ({node['type']}) is not known to the host.")
        inputs = _values(node, object_info)
        for name, origin in flat.origins.items():
            if isinstance(origin, Output):
                inputs[name] = [origin.node, origin.slot]
            elif isinstance(origin, WidgetOf):
                inputs[name] = _values(origin.node, object_info).get(origin.name)
            else:
                inputs[name] = origin.value
        prompt[flat.id] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title", node["type"])},
        }
    return prompt


def _values(node: JSON, object_info: dict[str, JSON]) -> JSON:
    """The values of a node's widgets, by name."""
    drawn = widgets(object_info[node["type"]], node.get("widgets_values") or [])
    return {name: value for name, value in drawn if name is not None and value is not None}


def widgets(info: JSON, values: Sequence[Any]) -> list[tuple[str | None, Any]]:
    """Return the widgets that the page draws for a node, in order: the input's name and its value.

    The name is None for widgets that only the page uses: control after generate, the upload button. If `values` is
    shorter, as in a file from an older version of the node, the rest are defaults, as on the page.

    Args:
        info: the node's entry in `/object_info`.
        values: the node's `widgets_values`.
    """
    inputs = info["input"]
    remaining = iter(values)
    return [
        widget
        for section in ("required", "optional")
        for name, spec in inputs.get(section, {}).items()
        for widget in _draw(name, spec, remaining)
    ]


def _draw(name: str, spec: list[Any], values: Iterator[Any]) -> Iterator[tuple[str | None, Any]]:
    """Yield the widgets of the input `name`, including nested ones; none if it is a socket."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    drawn = isinstance(kind, list) or kind in WIDGET_TYPES or "widgetType" in options
    if not drawn or options.get("forceInput"):
        return
    choices = kind if isinstance(kind, list) else options.get("options", [])
    keys = [choice["key"] if isinstance(choice, dict) else choice for choice in choices]
    value = next(values, options.get("default", keys[0] if keys else None))
    yield name, value
    if options.get("control_after_generate", kind == "INT" and name in SEEDS):
        yield None, next(values, "fixed")
    if kind != "STRING" and any(options.get(upload) for upload in UPLOADS):
        yield None, next(values, "image")
    if kind == "COMFY_DYNAMICCOMBO_V3" and value in keys:
        nested = choices[keys.index(value)]["inputs"]
        for section in ("required", "optional"):
            for inner, inner_spec in nested.get(section, {}).items():
                yield from _draw(f"{name}.{inner}", inner_spec, values)
