"""Checks that the paths and links in the project's documents exist."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from comfy_host.setup import PACK

DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "assets/demo_model/README.md",
    *sorted(path.relative_to(PACK).as_posix() for path in (PACK / "docs").rglob("*.md")),
]
ELSEWHERE = {
    "i2v_core/families/NAME.py": "stands for a family that is yet to be written",
    "build/screenshots/": "made by the tests of the page",
    "ComfyUI/custom_nodes/": "of a user's ComfyUI",
    "ComfyUI/models/diffusers/": "of a user's ComfyUI",
    "models/diffusers/i2vgen-xl/": "of a user's ComfyUI",
    "transformer/": "of a Wan model's folder",
    "scripts/convert_i2vgen_to_diffusers.py": "in the diffusers repository",
    "scripts/convert_wan_to_diffusers.py": "in the diffusers repository",
}
"""Paths that the documents name and that are not in this repository, with the reason."""

# Folders end in a slash. Placeholders, and words that begin with a slash or a quote, are patterns, routes or values.
_START, _END = r"(?<![\w./*<>{}'\"-])", r"(?![\w.*<-])"
_PATH = re.compile(rf"{_START}(?:(?:[\w.-]+/)+{_END}|(?:[\w.-]+/)*[\w-]+\.(?:py|js|toml|md)\b)")
_CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_GENERATED = {"build", "output", "__pycache__"}


@cache
def repository() -> frozenset[str]:
    """Every path of the repository, and every ending of one: documents may leave out leading folders."""
    endings: set[str] = set()
    for top in PACK.iterdir():
        if top.name.startswith(".") or top.name in _GENERATED:
            continue
        for path in (top, *top.rglob("*")):
            parts = path.relative_to(PACK).parts
            slash = "/" if path.is_dir() else ""
            endings |= {"/".join(parts[start:]) + slash for start in range(len(parts))}
    return frozenset(endings)


def named_paths(text: str) -> set[str]:
    """Paths of source files and folders that a document names in code spans and code blocks."""
    return {path for code in _CODE.findall(text) for path in _PATH.findall(code)}


@cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def problem_of(link: str, document: Path) -> str | None:
    """Why a relative link does not resolve; None if it does, or leads out of the repository."""
    if "://" in link:
        return None
    name, _, anchor = link.partition("#")
    target = (document.parent / name).resolve() if name else document
    if not target.exists():
        return f"{link}: there is no such file"
    if anchor and anchor not in anchors(target):
        return f"{link}: there is no such heading"
    return None


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_named_path_exists(name: str) -> None:
    missing = named_paths((PACK / name).read_text("utf-8")) - repository() - ELSEWHERE.keys()
    assert not missing, f"{name} names paths that do not exist: {sorted(missing)}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_resolves(name: str) -> None:
    document = PACK / name
    links = _LINK.findall(document.read_text("utf-8"))
    problems = [problem for link in links if (problem := problem_of(link, document)) is not None]
    assert not problems, f"{name}: {problems}"


def test_every_exception_is_needed() -> None:
    named: set[str] = set()
    for name in DOCUMENTS:
        named |= named_paths((PACK / name).read_text("utf-8"))
    assert ELSEWHERE.keys() <= named
    assert not ELSEWHERE.keys() & repository()


def test_paths_are_recognised_in_code_and_nowhere_else() -> None:
    text = (
        "see gone.py, `old/way.py`, `python scripts/run.py --x`, `locales/*/main.json`, `/queue`\n```\nold/  parts\n```"
    )
    assert named_paths(text) == {"old/way.py", "scripts/run.py", "old/"}


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# A heading, twice\n", "utf-8")
    assert problem_of("#a-heading-twice", document) is None
    assert problem_of("https://example.org/nothing", document) is None
    assert problem_of("#gone", document) == "#gone: there is no such heading"
    assert problem_of("gone.md", document) == "gone.md: there is no such file"
