"""Checks that docstrings can be read without the code below them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from comfy_host.setup import PACK

FOLDERS = ("i2v_core", "nodes", "scripts", "tests", "benchmarks", "training")
OPENINGS = ("What", "Of", "That", "As", "Such", "Those", "Whatever", "How")
"""Words that begin half a sentence, whose other half is the code: a verb or a noun says more."""


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """The name and the docstring of everything in a file that has one."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "module"), text


def test_a_docstring_begins_with_a_verb_or_a_noun() -> None:
    found = [
        f"{file.relative_to(PACK).as_posix()}, {name}: {text.splitlines()[0]}"
        for folder in FOLDERS
        for file in sorted((PACK / folder).rglob("*.py"))
        for name, text in docstrings(file)
        if text.split(maxsplit=1)[0] in OPENINGS
    ]
    assert found == []
