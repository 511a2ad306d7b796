"""Writes the nodes' English names and tooltips to locales/en, as a real ComfyUI reports them.

Run it after a change of texts: `.venv/bin/python scripts/make_locales.py`.

Other languages are written by hand; tests/host/test_locales.py reports missing and obsolete texts.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from comfy_host import setup
from comfy_host.client import Client
from comfy_host.server import PACK_FOLDER, Server

sys.path.append(str(setup.PACK))

from i2v_core.words import ENGLISH

Locale = dict[str, dict[str, Any]]
"""The content of a language's files, by file name without `.json`."""

LOCALES = setup.PACK / "locales"
PANEL = "i2vBudget"
"""Section of `main` with the texts of the pack's panels: those in `ENGLISH`, and others written by hand."""


def english(object_info: dict[str, dict[str, Any]]) -> Locale:
    """Build the locale files of this pack, in the form that ComfyUI's page reads, from the host's `/object_info`."""
    own = {name: node for name, node in object_info.items() if node["python_module"] == f"custom_nodes.{PACK_FOLDER}"}
    categories = {part: part for node in own.values() for part in node["category"].split("/")}
    main = {"nodeCategories": categories, PANEL: {**read("en")["main"][PANEL], **ENGLISH}}
    return {"main": main, "nodeDefs": {name: _texts(node) for name, node in own.items()}}


def read(language: str) -> Locale:
    return {file.stem: json.loads(file.read_text("utf-8")) for file in (LOCALES / language).glob("*.json")}


def _texts(node: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, dict[str, str]] = {}
    for section in ("required", "optional"):
        for name, (_, *options) in node["input"].get(section, {}).items():
            inputs[name] = {"name": name, "tooltip": options[0]["tooltip"]}
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": inputs,
        "outputs": {str(index): {"name": name, "tooltip": tooltip} for index, (name, tooltip) in enumerate(outputs)},
    }


def main() -> None:
    with Server(setup.find(Path(sys.executable))) as server:
        locale = english(Client(server.url).object_info())
    folder = LOCALES / "en"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in locale.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
