"""The live plan that the page asks for: what the node would say when it runs, without queueing."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
from comfy_host.client import Client, ExecutionError
from comfy_host.server import Server

from i2v_core.units import MIB

WIDGETS: dict[str, Any] = {
    "model": "tiny",
    "width": 64,
    "height": 64,
    "frames": 4,
    "guidance": True,
    "precision": "fp32",
    "budget": "2MiB",
    "reserve_gib": 0.0,
    "allow_approximate": False,
    "plan_for": "this machine",
}
TOO_LARGE = {"width": 256, "height": 256, "frames": 32, "budget": "6MiB"}


def post(server: Server, body: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(f"{server.url}/i2v_budget/plan", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def ask(server: Server, **changes: Any) -> tuple[int, Any]:
    return post(server, json.dumps({**WIDGETS, **changes}).encode())


def plan(server: Server, **changes: Any) -> Any:
    status, answer = ask(server, **changes)
    assert status == 200, answer
    return answer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"budget": "64MiB"},
        {"guidance": False, "frames": 9},
        {"plan_for": "8 GB", "precision": "auto", "budget": "1"},
    ],
    ids=["small", "roomy", "without guidance", "another card"],
)
def test_it_is_the_plan_that_the_node_makes(
    client: Client, server: Server, make_prompt: Any, changes: dict[str, Any]
) -> None:
    live = plan(server, **changes)
    widgets = {name: value for name, value in {**WIDGETS, **changes}.items() if name != "model"}
    prompt = make_prompt(budget=widgets)
    ran = client.run({name: prompt[name] for name in ("loader", "budget")}).outputs["budget"]["i2v_plan"][0]
    assert live["fits"] is True
    assert live["fixes"] == []
    assert live["verdict"].startswith("Fits: ")
    assert [{**stage, "needed_bytes": None} for stage in live["stages"]] == [
        {**stage, "needed_bytes": None} for stage in ran["stages"]
    ]
    assert (live["usable_bytes"], live["device"]) == (ran["usable_bytes"], ran["device"])
    assert live["binding_stage"] == ran["binding_stage"]


def test_what_does_not_fit_is_refused_as_the_node_refuses_it(client: Client, server: Server, make_prompt: Any) -> None:
    live = plan(server, **TOO_LARGE)
    assert live["fits"] is False
    assert live["verdict"].startswith(f"Does not fit: {live['binding_stage']} needs ")
    assert live["usable_bytes"] == 6 * MIB
    assert max(stage["needed_bytes"] for stage in live["stages"]) > live["usable_bytes"]
    with pytest.raises(ExecutionError) as refused:
        client.run(make_prompt(budget=TOO_LARGE))
    sizes = [fix["label"] for fix in live["fixes"] if fix["changes"].keys() & {"frames", "width"}]
    assert len(sizes) == 2
    assert all(size in refused.value.message for size in sizes)


@pytest.mark.parametrize(
    "changes", [TOO_LARGE, {**TOO_LARGE, "plan_for": "6 GB", "budget": "70MiB"}], ids=["here", "another card"]
)
def test_every_fix_does_fit(server: Server, changes: dict[str, Any]) -> None:
    fixes = plan(server, **changes)["fixes"]
    assert {name for fix in fixes for name in fix["changes"]} >= {"frames", "width", "height", "budget"}
    for fix in fixes:
        assert plan(server, **{**changes, **fix["changes"]})["fits"], fix


def test_a_precision_that_is_too_wide_can_be_left_to_the_planner(server: Server) -> None:
    """fp32 has just too little; bf16, which the CPU can do too, takes less."""
    amounts = [fix["changes"].get("budget", "") for fix in plan(server, **TOO_LARGE)["fixes"]]
    least_mib = int("".join(amounts).removesuffix(" MiB"))
    fixes = plan(server, **{**TOO_LARGE, "budget": f"{least_mib - 1}MiB"})["fixes"]
    assert {"precision": "auto"} in [fix["changes"] for fix in fixes]


def test_without_fixes_only_the_verdict_is_found(server: Server) -> None:
    answer = plan(server, **TOO_LARGE, fixes=False)
    assert answer["fits"] is False
    assert answer["fixes"] is None


def test_a_named_card_has_its_size_less_the_systems_share(server: Server) -> None:
    sizes = [plan(server, plan_for=name, budget="auto")["usable_bytes"] for name in ("6 GB", "8 GB", "24 GB")]
    assert [size // MIB for size in sizes] == [6 * 1024 - 768, 8 * 1024 - 768, 24 * 1024 - 768]


@pytest.mark.parametrize("plan_for", ["6 GB", "24 GB"])
def test_a_plan_for_another_card_is_made_again_where_it_runs(client: Client, make_prompt: Any, plan_for: str) -> None:
    outputs = client.run(make_prompt(budget={"plan_for": plan_for}, sampler={"seed": int(plan_for[:2])})).outputs
    assert outputs["budget"]["text"][0].startswith(f"Planned for a card with {plan_for}")
    assert outputs["budget"]["i2v_plan"][0]["device"] == f"a card with {plan_for}"
    for node in ("encode", "sampler", "decode"):
        assert f"planned for a card with {plan_for}: planned again for " in outputs[node]["text"][0]


BAD = {
    "an unknown model": ({"model": "nowhere"}, "there is no model folder 'nowhere'"),
    "a path": ({"model": "../diffusers/tiny"}, "there is no model folder"),
    "an absolute path": ({"model": "/etc"}, "there is no model folder"),
    "a model that is no text": ({"model": ["tiny"]}, "has no model"),
    "no model": ({"model": None}, "has no model"),
    "a width that is no multiple": ({"width": 100}, "not divisible by 8"),
    "a width as text": ({"width": "64"}, "not a whole number"),
    "a width that is true": ({"width": True}, "not a whole number"),
    "a width with a fraction": ({"width": 64.5}, "not a whole number"),
    "a huge width": ({"width": 10**300}, "out of range"),
    "no width": ({"width": None}, "not a whole number"),
    "no frames": ({"frames": 0}, "out of range"),
    "guidance as a number": ({"guidance": 1}, "not true or false"),
    "an unknown precision": ({"precision": "fp4"}, "not a valid precision"),
    "a budget of nothing": ({"budget": "0"}, "not possible"),
    "a budget that is no amount": ({"budget": "banana"}, "not an amount of memory"),
    "a budget as a number": ({"budget": 6}, "not text"),
    "a reserve below zero": ({"reserve_gib": -1}, "out of range"),
    "an endless reserve": ({"reserve_gib": float("inf")}, "not a finite number"),
    "a reserve of all": ({"reserve_gib": 1.0}, "leaves nothing"),
    "an unknown card": ({"plan_for": "7 GB"}, "not a valid plan_for"),
    "an input that there is not": ({"steps": 5}, "'steps' is not an input"),
    "fixes as text": ({"fixes": "yes"}, "fixes is not true or false"),
}


@pytest.mark.parametrize(("changes", "said"), BAD.values(), ids=BAD.keys())
def test_bad_values_are_answered(server: Server, changes: dict[str, Any], said: str) -> None:
    status, answer = ask(server, **changes)
    assert status == 400
    assert said in answer["error"]["problem"]
    assert len(answer["error"]["remedy"]) > 5


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 9000, b"{}", b'{"model": "tiny"}', b" " * 20_000],
    ids=["nothing", "cut off", "a list", "a number", "no text", "deep", "empty", "a model alone", "long"],
)
def test_bad_bodies_are_answered(server: Server, body: bytes) -> None:
    status, answer = post(server, body)
    assert status == 400
    assert answer["error"].keys() == {"problem", "remedy"}


def test_a_damaged_model_is_said_and_when_mended_planned_for(server: Server) -> None:
    config = server.models_folder / "diffusers" / "tiny" / "unet" / "config.json"
    whole = config.read_bytes()
    assert plan(server)["fits"]
    try:
        config.write_bytes(whole[:-5])
        status, answer = ask(server)
        assert status == 400
        assert "config.json cannot be read as JSON" in answer["error"]["problem"]
    finally:
        config.write_bytes(whole)
    assert plan(server)["fits"]


def test_the_server_answers_others_meanwhile_and_gives_up_what_nobody_waits_for(client: Client, server: Server) -> None:
    """Speed is printed: how fast it is depends on the machine."""
    took: list[float] = []
    for width in (128, 136, 144, 152):
        start = time.monotonic()
        plan(server, width=width, fixes=False)
        took.append(time.monotonic() - start)
    print(f"a new size: {min(took) * 1000:.0f} to {max(took) * 1000:.0f} ms")  # noqa: T201
    request = urllib.request.Request(
        f"{server.url}/i2v_budget/plan", json.dumps({**WIDGETS, **TOO_LARGE, "width": 1024}).encode()
    )
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=0.01)
    start = time.monotonic()
    assert client.system_stats()["devices"]
    assert plan(server, width=160, fixes=False)["fits"]
    print(f"beside one that was given up: {(time.monotonic() - start) * 1000:.0f} ms")  # noqa: T201
