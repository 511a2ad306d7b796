"""The queue, seen and steered by its routes on a real host."""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comfy_host.server import Server
from PIL import Image

from i2v_core.batch.jobs.job import JobSpec, JobState
from i2v_core.batch.jobs.leases import LeaseManager
from i2v_core.batch.jobs.store import JobStore
from i2v_core.families import VideoSize

from .conftest import PICTURE

PATH = "/i2v_budget/queue"


def ask(server: Server, body: Any = None, *, path: str = PATH) -> tuple[int, Any]:
    """The answer to `body`, or without one the content at the path."""
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, content), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def queue(server: Server, body: Any = None, *, path: str = PATH) -> Any:
    status, answer = ask(server, body, path=path)
    assert status == 200, answer
    return answer


@pytest.fixture
def file(server: Server) -> Iterator[Path]:
    """The queue's file, which is not there yet."""
    path = server.user_folder / "i2v_budget" / "jobs.queue"
    _remove(path)
    yield path
    _remove(path)


def _remove(path: Path) -> None:
    for found in path.parent.glob(f"{path.name}*"):
        found.unlink()


@pytest.fixture
def store(file: Path) -> Iterator[JobStore]:
    opened = JobStore(file)
    yield opened
    opened.close()


@pytest.fixture
def spec(server: Server) -> JobSpec:
    return JobSpec(
        model=Path("model"),
        image=server.input_folder / PICTURE,
        prompt="a circle moves",
        size=VideoSize(width_pixels=64, height_pixels=64, frames=4),
        steps=2,
        cfg=1.0,
        fps=8.0,
    )


@pytest.fixture
def ids(store: JobStore, spec: JobSpec) -> list[int]:
    return list(store.add(replace(spec, seed=seed) for seed in range(4)))


def state_of(server: Server, job: int) -> str:
    return next(it["state"] for it in queue(server)["jobs"] if it["id"] == job)


def test_a_question_makes_no_queue(server: Server, file: Path) -> None:
    answer = queue(server)
    assert (answer["paused"], answer["jobs"], sum(answer["counts"].values())) == (False, [], 0)
    for body in ({"action": "pause"}, {"action": "cancel", "job": 1}):
        status, answer = ask(server, body)
        assert (status, answer["error"]["problem"]) == (400, "there is no queue yet")
    assert not file.exists()


def test_a_queue_that_was_made_anew_is_read_anew(server: Server, file: Path, spec: JobSpec) -> None:
    for count in (1, 3):
        store = JobStore(file)
        store.add(replace(spec, seed=seed) for seed in range(count))
        assert len(queue(server)["jobs"]) == count
        store.close()
        _remove(file)
        assert queue(server)["jobs"] == []


def test_a_job_says_what_it_is_and_where_it_stands(
    server: Server, store: JobStore, ids: list[int], spec: JobSpec
) -> None:
    video = server.output_folder / "batch" / "a.mp4"
    video.parent.mkdir(exist_ok=True)
    video.touch()
    leases = LeaseManager(store)
    store.note_predictions([(job, 100.0, 3 << 30) for job in ids])
    leases.claim(ids[0], "a card")
    leases.renew({ids[0]: ("sample", 7, 25)})
    leases.claim(ids[1], "a card")
    leases.finish(ids[1], video, {}, 2 << 30)
    leases.claim(ids[2], "a card")
    leases.fail(ids[2], "it did not work", {}, attempts=1)
    answer = queue(server)
    assert {name: count for name, count in answer["counts"].items() if count} == {
        "running": 1,
        "waiting": 1,
        "failed": 1,
        "done": 1,
    }
    assert 100 < answer["seconds_left"] <= 200
    running, waiting, failed, done = answer["jobs"]
    assert [it["state"] for it in answer["jobs"]] == ["running", "waiting", "failed", "done"]
    assert (running["stage"], running["done"], running["total"], running["device"]) == ("sample", 7, 25, "a card")
    assert 0 < running["seconds_left"] <= 100
    assert (waiting["name"], waiting["prompt"], waiting["size"]) == (PICTURE, spec.prompt, "64×64×4")
    assert (waiting["predicted_bytes"], waiting["seed"], waiting["output"]) == (3 << 30, "3", None)
    assert (answer["rule"], answer["waits"], answer["remarks"]) == ("weight", [], [])
    assert waiting["why"]["text"].startswith("score ")
    assert "100.0 s ÷ 3.00 GiB × priority 1" in waiting["why"]["text"]
    assert waiting["why"]["key"] == "whyScoreLoaded"
    assert waiting["why"]["values"]["amount"] == "3.00 GiB"
    assert running["why"] is None
    assert (failed["problem"], failed["attempts"]) == ("it did not work", 1)
    assert done["measured_bytes"] == 2 << 30
    assert done["output"] == {"filename": "a.mp4", "subfolder": "batch", "type": "output"}
    assert done["image"] == {"filename": PICTURE, "subfolder": "", "type": "input"}


def test_jobs_are_paused_resumed_cancelled_and_tried_again(server: Server, store: JobStore, ids: list[int]) -> None:
    job = ids[1]
    for action, state in (
        ("pause", "paused"),
        ("resume", "waiting"),
        ("cancel", "cancelled"),
        ("retry", "waiting"),
    ):
        queue(server, {"action": action, "job": job})
        assert state_of(server, job) == store.job(job).state.value == state
    status, answer = ask(server, {"action": "retry", "job": job})
    assert (status, answer["error"]["problem"]) == (400, f"job {job} is waiting and cannot be retried")
    assert store.counts()[JobState.WAITING] == len(ids)


def test_of_a_job_that_runs_it_is_wished(server: Server, store: JobStore, ids: list[int]) -> None:
    leases = LeaseManager(store)
    leases.claim(ids[0], "a card")
    job = queue(server, {"action": "cancel", "job": ids[0]})["jobs"][0]
    assert (job["state"], job["wish"]) == ("running", "cancel")


def test_the_queue_is_paused_and_resumed(server: Server, store: JobStore, ids: list[int]) -> None:
    assert queue(server, {"action": "pause"})["paused"]
    assert store.paused
    assert LeaseManager(store).claim(ids[0], "a card") is None
    assert not queue(server, {"action": "resume"})["paused"]
    assert not store.paused


def test_jobs_are_listed_in_the_order_in_which_they_will_run(server: Server, store: JobStore, ids: list[int]) -> None:
    store.note_predictions([(job, seconds, 1 << 30) for job, seconds in zip(ids, (10, 30, 20, 40), strict=True)])
    order = [ids[3], ids[1], ids[2], ids[0]]
    assert [it["id"] for it in queue(server)["jobs"]] == order
    answer = queue(server, {"action": "prioritize", "job": ids[0], "priority": 9})
    assert [it["id"] for it in answer["jobs"]] == [ids[0], ids[3], ids[1], ids[2]]
    assert answer["jobs"][0]["priority"] == 9
    answer = queue(server, {"action": "pin", "jobs": [ids[2], ids[1]]})
    assert [(it["id"], it["pinned"]) for it in answer["jobs"]] == [
        (ids[2], True),
        (ids[1], True),
        (ids[0], False),
        (ids[3], False),
    ]


def test_prometheus_can_read_how_it_stands(server: Server, store: JobStore, ids: list[int]) -> None:
    store.cancel(ids[0])
    with urllib.request.urlopen(f"{server.url}{PATH}/metrics", timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    assert lines[0] == "# TYPE i2v_queue_jobs gauge"
    assert {'i2v_queue_jobs{state="waiting"} 3', 'i2v_queue_jobs{state="cancelled"} 1'} < set(lines)
    assert all(len(line.split()) == 2 for line in lines if not line.startswith("#"))


def test_as_many_are_listed_as_are_asked_for(server: Server, store: JobStore, ids: list[int]) -> None:
    store.cancel(ids[3])
    answer = queue(server, path=f"{PATH}?most=2")
    assert [it["state"] for it in answer["jobs"]] == ["waiting", "waiting", "cancelled"]
    assert answer["counts"]["waiting"] == 3


def picture(server: Server, path: str) -> Image.Image:
    with urllib.request.urlopen(server.url + path, timeout=60) as answer:
        return Image.open(io.BytesIO(answer.read()))


def test_a_job_has_a_picture_before_there_is_a_frame_of_it(
    server: Server, store: JobStore, ids: list[int], tmp_path: Path
) -> None:
    first = queue(server)["jobs"][0]["thumbnail"]
    assert picture(server, first).size == (96, 64)
    frame = tmp_path / "frame.png"
    Image.new("RGB", (640, 320), "teal").save(frame)
    leases = LeaseManager(store)
    leases.claim(ids[0], "a card")
    leases.show(ids[0], thumbnail=frame)
    second = queue(server)["jobs"][0]["thumbnail"]
    assert second != first
    assert picture(server, second).size == (192, 96)


@pytest.mark.parametrize("content", [b"secret", b""], ids=["text", "nothing"])
def test_what_is_no_picture_is_not_given_out(
    server: Server, store: JobStore, spec: JobSpec, tmp_path: Path, content: bytes
) -> None:
    private = tmp_path / "private.key"
    private.write_bytes(content)
    (job,) = store.add([replace(spec, image=private)])
    status, answer = ask(server, path=f"{PATH}/{job}/thumbnail")
    assert status == 400
    assert "has no picture" in answer["error"]["problem"]


@pytest.mark.parametrize("job", ["0", "-1", "x", "1e3", "9" * 30, "99", "..%2F..%2Fjobs.queue", "%00"])
@pytest.mark.usefixtures("ids")
def test_a_picture_is_of_a_job(server: Server, job: str) -> None:
    status, answer = ask(server, path=f"{PATH}/{job}/thumbnail")
    assert status == 400
    assert "job" in answer["error"]["problem"]


BAD: dict[str, tuple[Any, str]] = {
    "no action": ({"job": 1}, "None is not an action"),
    "an unknown action": ({"action": "delete", "job": 1}, "'delete' is not an action"),
    "an action of another kind": ({"action": ["cancel"], "job": 1}, "is not an action"),
    "no job": ({"action": "cancel"}, "cancel has no job"),
    "an unknown job": ({"action": "cancel", "job": 99}, "there is no job 99"),
    "a job as text": ({"action": "cancel", "job": "1"}, "'1' is not the id of a job"),
    "a job that is true": ({"action": "cancel", "job": True}, "True is not the id of a job"),
    "a job below one": ({"action": "pause", "job": 0}, "0 is not the id of a job"),
    "a huge job": ({"action": "retry", "job": 10**40}, "is not the id of a job"),
    "null for the queue": ({"action": "pause", "job": None}, "None is not the id of a job"),
    "a stranger": ({"action": "cancel", "job": 1, "path": "/etc"}, "takes no 'path'"),
    "no priority": ({"action": "prioritize", "job": 1}, "prioritize has no priority"),
    "a priority of zero": ({"action": "prioritize", "job": 1, "priority": 0}, "a priority of 0 is not possible"),
    "a priority below zero": ({"action": "prioritize", "job": 1, "priority": -1}, "not possible"),
    "no number": ({"action": "prioritize", "job": 1, "priority": float("nan")}, "not possible"),
    "an endless priority": ({"action": "prioritize", "job": 1, "priority": float("inf")}, "not possible"),
    "a huge priority": ({"action": "prioritize", "job": 1, "priority": 10**400}, "not possible"),
    "a priority as text": ({"action": "prioritize", "job": 1, "priority": "high"}, "'high' is not a number"),
    "no list": ({"action": "pin", "jobs": 1}, "1 is not a list of different jobs"),
    "a job twice": ({"action": "pin", "jobs": [1, 1]}, "not a list of different jobs"),
    "a list of other things": ({"action": "pin", "jobs": [[1]]}, "[1] is not the id of a job"),
    "an unknown job in a list": ({"action": "pin", "jobs": [1, 99]}, "there is no job 99"),
    "a list as a body": ([], "not a JSON object"),
    "no JSON": (b"{", "not valid JSON"),
    "no text": (b"\xff\xfe", "not valid JSON"),
    "too long": (b" " * 20_000, "longer than 16,384 bytes"),
}


@pytest.mark.parametrize(("body", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_answered_and_changes_nothing(
    server: Server, store: JobStore, ids: list[int], body: Any, said: str
) -> None:
    before = store.jobs()
    status, answer = ask(server, body)
    assert status == 400
    assert said in answer["error"]["problem"]
    assert len(answer["error"]["remedy"]) > 5
    assert store.jobs() == before
    assert before[0].id == ids[0] == 1


@pytest.mark.parametrize("most", ["0", "-1", "x", "", "1e9", "99999"])
def test_a_bad_number_of_jobs_is_answered(server: Server, most: str) -> None:
    status, answer = ask(server, path=f"{PATH}?most={most}")
    assert status == 400
    assert "most is" in answer["error"]["problem"]
