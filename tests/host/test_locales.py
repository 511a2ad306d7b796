"""Names, tooltips and help pages in English and Chinese: complete, up to date, and where the page asks for them."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from comfy_host import setup
from comfy_host.server import PACK_FOLDER, Server
from make_locales import PANEL, english, read

from i2v_core.batch.jobs.job import JobState, StopRequest
from i2v_core.planning.plan import Stage
from i2v_core.words import ENGLISH

LANGUAGES = ("en", "zh")
SCRIPTS = setup.PACK / "web" / "js"
HELP = setup.PACK / "web" / "js" / "docs"
CHINESE = re.compile(r"[\u4e00-\u9fff]")
SYNTAX = re.compile(r"[{}@|]")
"""What the page's translator would take for its own: placeholders, links and plurals."""


def texts(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every text in a locale."""
    if isinstance(tree, str):
        yield path, tree
        return
    for key, branch in tree.items():
        yield from texts(branch, f"{path}/{key}")


def fetch(server: Server, path: str) -> bytes:
    with urllib.request.urlopen(server.url + path, timeout=30) as answer:
        return answer.read()


def test_english_is_what_the_nodes_say(object_info: dict[str, Any]) -> None:
    assert read("en") == english(object_info), "run scripts/make_locales.py"


def test_chinese_has_every_text_and_no_others(object_info: dict[str, Any]) -> None:
    wanted, found = dict(texts(english(object_info))), dict(texts(read("zh")))
    assert sorted(wanted.keys() - found.keys()) == [], "missing"
    assert sorted(found.keys() - wanted.keys()) == [], "left over"


def test_chinese_explanations_are_chinese_and_name_the_same_numbers(object_info: dict[str, Any]) -> None:
    """Defaults and limits are in the texts: where those change, the translation must too."""
    chinese = dict(texts(read("zh")))
    for path, text in texts(english(object_info)):
        if path.endswith(("/tooltip", "/description")):
            assert CHINESE.search(chinese[path]), path
            assert numbers(chinese[path]) == numbers(text), path


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_has_the_translators_own_syntax(language: str) -> None:
    assert [path for path, text in texts(read(language)) if SYNTAX.search(text)] == []


def test_the_page_gets_both_languages(server: Server) -> None:
    translations = json.loads(fetch(server, "/i18n"))
    for language in LANGUAGES:
        assert translations[language] == {**read(language)["main"], "nodeDefs": read(language)["nodeDefs"]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page_that_names_all_it_takes_and_gives(
    server: Server, object_info: dict[str, Any], language: str
) -> None:
    for node_id, node in english(object_info)["nodeDefs"].items():
        page = fetch(server, f"/extensions/{PACK_FOLDER}/docs/{node_id}/{language}.md").decode("utf-8")
        assert page.startswith(f"# {read(language)['nodeDefs'][node_id]['display_name']}\n")
        named = [*node["inputs"], *(output["name"] for output in node["outputs"].values())]
        assert [name for name in named if f"`{name}`" not in page] == [], (node_id, language)


def test_no_help_page_is_left_over(object_info: dict[str, Any]) -> None:
    wanted = {f"{node_id}/{language}.md" for node_id in english(object_info)["nodeDefs"] for language in LANGUAGES}
    assert {file.relative_to(HELP).as_posix() for file in HELP.rglob("*") if file.is_file()} == wanted


def panel_texts() -> set[str]:
    """The keys of the texts that the pack's scripts show, by what is in the scripts and what the server sends."""
    scripts = "".join(file.read_text("utf-8") for file in SCRIPTS.glob("*.js"))
    literal = re.findall(r"""\bt\(\s*"(\w+)""", scripts)
    either = re.findall(r"""\bt\(\w+(?: === \d+)? \? "(\w+)" : "(\w+)\"""", scripts)
    named = {"weights", "activations", "margin", *(stage.value for stage in Stage), "whole", "pieces", "streamed"}
    named |= {f"{word}Job" for word in (*(state.value for state in JobState), "pause", "resume", "cancel", "retry")}
    named |= {*(f"{wish.value}Wish" for wish in StopRequest), "weightRule", "firstComeRule"}
    return named | ENGLISH.keys() | set(literal) | {key for pair in either for key in pair}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_of_the_panel_is_there_and_no_other(language: str) -> None:
    assert read(language)["main"][PANEL].keys() == panel_texts()


def test_what_is_filled_in_is_the_same_in_both_languages() -> None:
    english_texts, chinese_texts = (read(language)["main"][PANEL] for language in LANGUAGES)
    for key, text in english_texts.items():
        filled = set(re.findall(r"\$\w+", text))
        assert set(re.findall(r"\$[a-z]+", chinese_texts[key])) == filled, key
