"""Random JSON as an input of a prompt: it is refused, fails with a remedy, or gives a result; and the host goes on.

Values are those that programs trip over, and random ones; links lead to every kind of output, and nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from comfy_host.client import Client, ExecutionError, PromptRefusedError
from comfy_host.server import PACK_FOLDER, Server
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Prompt = dict[str, dict[str, Any]]

MOST_SECONDS = 30.0
"""That one prompt of a small model may take, on a slow machine."""

NODES = {
    "loader": "I2VLoader",
    "budget": "I2VVRAMBudget",
    "encode": "I2VEncode",
    "sampler": "I2VChunkedSampler",
    "decode": "I2VVAETiledDecode",
    "video": "I2VSaveVideo",
    "keep": "I2VSaveLatent",
    "load": "I2VLoadLatent",
}
"""This pack's nodes, by their name in the prompt."""

VALUES: Mapping[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "minus one": -1,
    "a fraction": 0.5,
    "above 32 bits": 2**32,
    "above 64 bits": 2**64,
    "far above": 10**300,
    "far below": -(10**300),
    "a huge float": 1e308,
    "NaN": math.nan,
    "infinity": math.inf,
    "empty": "",
    "a space": " ",
    "NaN as text": "nan",
    "infinity as text": "1e999",
    "unicode": "кошка 🐈 \u202e",
    "half of a character": "\ud800",
    "a null character": "a\0b",
    "a long number": "9" * 30_000,
    "a long word": "ab" * 15_000,
    "long space": "6" + " " * 30_000 + "x",
    "a way out": "../../../etc/passwd",
    "a latent out": "../../x.latent [output]",
    "a URL": "http://127.0.0.1:9/x.latent",
    "no list": [],
    "one": [1],
    "no such node": ["nowhere", 0],
    "no such output": ["loader", 9],
    "an output below": ["loader", -9],
    "an output as text": ["loader", "0"],
    "a link of lists": [["loader"], [0]],
    "an object": {"a": [1, {"b": None}]},
    "a wrapped list": {"__value__": [1, 2, 3]},
    "a model": ["loader", 0],
    "a plan": ["budget", 0],
    "a text": ["budget", 1],
    "a number": ["budget", 2],
    "a picture": ["picture", 0],
    "a mask": ["picture", 1],
    "a conditioning": ["encode", 0],
    "a latent": ["other", 0],
}


@pytest.fixture(scope="module")
def server(own_server: Server) -> Server:
    """Not the one of all tests, whose log would grow by megabytes of refusals."""
    return own_server


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return Client(server.url)


@pytest.fixture(scope="module")
def object_info(client: Client) -> dict[str, Any]:
    return client.object_info()


@pytest.fixture(scope="module")
def whole_prompt(make_prompt: Any) -> Prompt:
    """Every node of this pack in one small prompt, and a latent of 16 channels."""
    prompt = make_prompt(budget={"frames": 2}, sampler={"steps": 1})
    del prompt["save"]
    prompt["other"] = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 2}}
    decoded = {"model": ["loader", 0], "plan": ["budget", 0], "latent": ["sampler", 0]}
    video = {"filename_prefix": "r/clip", "format": "png", "fps": 8.0, "quality": 30, **decoded}
    prompt["video"] = {"class_type": "I2VSaveVideo", "inputs": video}
    keep = {"latent": ["sampler", 0], "plan": ["budget", 0], "filename_prefix": "r/kept"}
    prompt["keep"] = {"class_type": "I2VSaveLatent", "inputs": keep}
    prompt["load"] = {"class_type": "I2VLoadLatent", "inputs": {"file": "demo (bundled)"}}
    return prompt


def part(prompt: Prompt, node: str, changes: Mapping[str, Any]) -> Prompt:
    """The part of the prompt that the node needs, with its inputs changed, and one that makes the host run it."""
    changed = {name: {**entry, "inputs": dict(entry["inputs"])} for name, entry in prompt.items()}
    changed[node]["inputs"].update(changes)
    needed, new = set[str](), {node}
    while new:
        needed |= new
        links = (value for name in new for value in changed[name]["inputs"].values())
        new = {link[0] for link in links if _is_link(link) and link[0] in changed} - needed
    shown = {"class_type": "PreviewAny", "inputs": {"source": [node, 0]}}
    return {"shown": shown, **{name: changed[name] for name in sorted(needed)}}


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def outcome(client: Client, prompt: Prompt) -> str:
    """The prompt's end, when that is as it should be: a refusal with reasons, an error of this pack, or a result.

    Refused are also prompts of which the host runs the rest.
    """
    try:
        client.run(prompt, timeout_seconds=MOST_SECONDS)
    except PromptRefusedError as refusal:
        check_refusal(refusal)
        return "refused"
    except ExecutionError as error:
        check_failure(error)
        return "failed"
    return "done"


def check_refusal(refusal: PromptRefusedError) -> None:
    reasons = [error for node in refusal.node_errors.values() for error in node["errors"]]
    assert reasons, refusal.error
    for reason in reasons:
        trace = "".join(reason.get("extra_info", {}).get("traceback", ()))
        assert PACK_FOLDER not in trace, f"this pack fell over: {reason['details']}\n{trace}"


def check_failure(error: ExecutionError) -> None:
    assert error.node_type in NODES.values(), error
    assert "i2v_core" in error.exception_type, f"{error.exception_type}: {error}"
    assert "Remedy: " in error.message
    assert len(error.message) < 4000


def inputs_of(object_info: Mapping[str, Any], node: str) -> dict[str, str]:
    """The types of a node's inputs, by their names."""
    sections = object_info[NODES[node]]["input"]
    return {name: spec[0] for part in ("required", "optional") for name, spec in sections.get(part, {}).items()}


@pytest.fixture(autouse=True)
def going_on(client: Client, whole_prompt: Prompt) -> Iterator[None]:
    """After each test the host answers, and a good prompt runs."""
    yield
    assert client.system_stats()["system"]
    for node in NODES:
        assert outcome(client, part(whole_prompt, node, {})) == "done"


@pytest.mark.parametrize("node", NODES)
def test_no_value_that_programs_trip_over_goes_unanswered(
    node: str, client: Client, whole_prompt: Prompt, object_info: Mapping[str, Any]
) -> None:
    found = {
        (name, value): outcome(client, part(whole_prompt, node, {name: VALUES[value]}))
        for name in inputs_of(object_info, node)
        for value in VALUES
    }
    for name, kind in inputs_of(object_info, node).items():
        assert found[name, "no such node"] == found[name, "one"] == "refused"
        if kind not in {"STRING", "BOOLEAN"}:  # what the host makes a text or a truth of, whatever it is
            assert found[name, "an object"] != "done"


NUMBERS = st.integers() | st.integers(0, 128) | st.floats() | st.floats(0, 128)
LINKS = st.tuples(st.sampled_from([*NODES, "picture", "other", "nowhere"]), st.integers(-1, 8)).map(list)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | LINKS | st.sampled_from(list(VALUES.values())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_random_json_is_answered(
    data: st.DataObject, client: Client, whole_prompt: Prompt, object_info: Mapping[str, Any]
) -> None:
    node = data.draw(st.sampled_from(list(NODES)))
    changes = data.draw(
        st.dictionaries(st.sampled_from(list(inputs_of(object_info, node))), JSON_VALUES, min_size=1, max_size=3)
    )
    outcome(client, part(whole_prompt, node, _affordable(changes)))


def _affordable(changes: dict[str, Any]) -> dict[str, Any]:
    """Without many steps, which would be right and take long."""
    try:
        many = 2 < int(changes["steps"]) <= 1000
    except (KeyError, TypeError, ValueError, OverflowError):
        many = False
    return {**changes, "steps": 2} if many else changes
