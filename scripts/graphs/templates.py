"""The workflow templates that come with a ComfyUI, from its package of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from .level import JSON

PACKAGE = "comfyui_workflow_templates_json"


def open_video_templates() -> dict[str, Path]:
    """Files of the templates that make videos with models that one can download, by name; none without the package."""
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found: dict[str, Path] = {}
    for folder in folders:
        files = Path(folder, "templates")
        for template in _entries(files / "index.json"):
            file = files / f"{template['name']}.json"
            if file.is_file():
                found[template["name"]] = file
    return found


def _entries(index: Path) -> Iterator[JSON]:
    """Entries of the open video templates in an index."""
    for category in json.loads(index.read_text("utf-8")) if index.is_file() else ():
        for template in category["templates"]:
            tags = template.get("tags") or ()
            makes_video = category.get("type") == "video" or "Video" in tags
            if makes_video and "API" not in tags and template.get("openSource") is not False:
                yield template
