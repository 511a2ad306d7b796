"""I2V Batch on a real host: lists, folders and images made into videos, whatever rows are bad or runs cut short."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import imageio.v3 as iio
import pytest
import torch
from comfy_host.client import Client, Event, ExecutionError, InterruptedRunError, PromptRefusedError
from comfy_host.errors import HostError
from comfy_host.server import Server
from comfy_host.setup import PACK
from comfy_host.workflow import to_prompt
from PIL import Image

from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.store import JobStore

from .conftest import PICTURE, MakePrompt
from .test_crash import kill

Prompt = dict[str, dict[str, Any]]

WIDGETS: dict[str, Any] = {
    "jobs": "clips/list.csv",
    "prompts": "",
    "negative_prompt": "",
    "steps": 2,
    "cfg": 2.0,
    "seed": 0,
    "scheduler": "ddim",
    "fps": 8.0,
    "format": "mp4",
    "priority": 1.0,
    "rule": "weight",
    "output_folder": "made",
}


@pytest.fixture
def batch_prompt(make_prompt: MakePrompt) -> Callable[..., Prompt]:
    """A prompt of the loader, a plan of 64×64×4 and the node; arguments are its inputs."""

    def make(**inputs: Any) -> Prompt:
        prompt = make_prompt()
        links = {"model": ["loader", 0], "plan": ["budget", 0]}
        batch = {"class_type": "I2VBatch", "inputs": {**links, **WIDGETS, **inputs}}
        return {"loader": prompt["loader"], "budget": prompt["budget"], "batch": batch}

    return make


@pytest.fixture
def clips(server: Server) -> Iterator[Path]:
    """A folder with two pictures in the host's input folder; what is made, and the queue, are gone afterwards."""
    folder = server.input_folder / "clips"
    folder.mkdir()
    for name, colour in (("one.png", "orange"), ("two.png", "teal")):
        Image.new("RGB", (64, 64), colour).save(folder / name)
    yield folder
    for made in (folder, server.output_folder / "made", server.user_folder / "i2v_budget"):
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def store(server: Server, clips: Path) -> Iterator[JobStore]:
    assert clips.is_dir()
    opened = JobStore(server.user_folder / "i2v_budget" / "jobs.queue")
    yield opened
    opened.close()


def write_list(folder: Path, *rows: str, header: str = "image,prompt,seed,size,frames") -> None:
    (folder / "list.csv").write_text("\n".join([header, *rows]), "utf-8")


def videos(server: Server) -> list[Path]:
    return sorted((server.output_folder / "made").glob("*.mp4"))


def text_of(run: Any) -> str:
    return run.outputs["batch"]["text"][0]


def test_good_rows_run_and_bad_ones_are_named(
    client: Client, server: Server, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    write_list(
        clips,
        "one.png,a circle,1,,",
        "gone.png,a circle,2,,",
        "two.png,a square,3,96x64,2",
        "one.png,a circle,x,,",
        "one.png,a circle,5,,",
    )
    progress: list[tuple[float, float]] = []

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "batch":
            progress.append((event.data["value"], event.data["max"]))

    run = client.run(batch_prompt(), watch=watch)
    text = text_of(run)
    assert text.startswith("3 done; 2 rows cannot run\n")
    assert "line 3: the picture" in text
    assert "gone.png cannot be read: there is no such file. Remedy: " in text
    assert "line 5: the seed is 'x', which is not a whole number. Remedy: " in text
    found = videos(server)
    assert sorted(iio.imread(video, plugin="pyav").shape for video in found) == [(2, 64, 96, 3), *[(4, 64, 64, 3)] * 2]
    assert all(video.name in text for video in found)
    assert progress[-1] == (300, 300)
    (shown,) = run.outputs["batch"]["images"]
    with urllib.request.urlopen(f"{server.url}/view?{urlencode(shown)}") as answer:
        assert min(iio.imread(answer.read()).shape[:2]) > 100
    with urllib.request.urlopen(f"{server.url}/i2v_budget/queue/metrics") as answer:
        assert b"i2v_batch_jobs_done_total 3\n" in answer.read()
    with urllib.request.urlopen(f"{server.url}/i2v_budget/queue") as answer:
        queue = json.loads(answer.read())
    assert queue["counts"]["done"] == 3
    for job in queue["jobs"]:
        assert job["measured_bytes"] > 0
        assert job["predicted_bytes"] > 0
        assert job["output"]["subfolder"] == "made"


def test_run_again_nothing_is_made_twice_and_what_is_new_or_lost_is_made(
    client: Client, server: Server, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    write_list(clips, "one.png,a circle,1,,", "two.png,a circle,1,,")
    client.run(batch_prompt())
    kept, lost = videos(server)
    before = kept.stat().st_mtime_ns
    lost.unlink()
    write_list(clips, "one.png,a circle,1,,", "two.png,a circle,1,,", "two.png,a circle,2,,")
    run = client.run(batch_prompt())
    assert text_of(run).startswith("3 done\n")
    assert len(videos(server)) == 3
    assert lost.is_file()
    assert kept.stat().st_mtime_ns == before


def test_an_interrupt_leaves_the_rest_for_the_next_run(
    client: Client, server: Server, store: JobStore, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    write_list(clips, *(f"one.png,a circle,{seed},," for seed in range(4)))
    prompt = batch_prompt(steps=60, rule="first-come")

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "batch" and store.counts()[JobState.DONE]:
            client.interrupt()

    with pytest.raises(InterruptedRunError):
        client.run(prompt, watch=watch)
    counts = store.counts()
    assert counts[JobState.RUNNING] == counts[JobState.FAILED] == 0
    assert 0 < counts[JobState.DONE] < 4
    assert counts[JobState.DONE] + counts[JobState.WAITING] == 4
    made = {video: video.stat().st_mtime_ns for video in videos(server)}
    assert text_of(client.run(prompt)).startswith("4 done\n")
    assert len(videos(server)) == 4
    assert {video: video.stat().st_mtime_ns for video in made} == made


def test_jobs_are_steered_while_they_run(
    client: Client, server: Server, store: JobStore, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    """Through the routes: one is cancelled and one paused while the first runs; neither keeps the node."""
    write_list(clips, *(f"one.png,a circle,{seed},," for seed in range(6)))
    steered: list[int] = []

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "batch" and not steered:
            steered.extend(job.id for job in store.jobs(JobState.WAITING)[-2:])
            for action, job in zip(("cancel", "pause"), steered, strict=True):
                body = json.dumps({"action": action, "job": job}).encode()
                urllib.request.urlopen(urllib.request.Request(f"{server.url}/i2v_budget/queue", body)).close()

    run = client.run(batch_prompt(steps=40, rule="first-come"), watch=watch)
    assert text_of(run).startswith("1 paused, 4 done, 1 cancelled\n")
    assert [store.job(job).state for job in steered] == [JobState.CANCELLED, JobState.PAUSED]
    assert len(videos(server)) == 4


def test_other_lists_in_the_queue_are_left_alone(
    client: Client, store: JobStore, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    write_list(clips, "one.png,a circle,1,,")
    client.run(batch_prompt())
    (job,) = store.jobs()
    (other,) = store.add([replace(job.spec, seed=9)])
    write_list(clips, "two.png,a circle,1,,")
    client.run(batch_prompt())
    assert store.job(other).state is JobState.WAITING


@pytest.mark.parametrize("devices", ["ComfyUI's own", "all cards"])
def test_jobs_run_on_the_devices_that_are_asked_for(
    client: Client, server: Server, clips: Path, store: JobStore, batch_prompt: Callable[..., Prompt], devices: str
) -> None:
    write_list(clips, "one.png,a circle,1,,", "two.png,a square,2,,")
    assert text_of(client.run(batch_prompt(devices=devices))).startswith("2 done\n")
    assert len(videos(server)) == 2
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    used = {job.device for job in store.jobs()}
    assert used <= set(cards if devices == "all cards" else cards[:1])


def test_a_folder_of_pictures_has_its_prompts_beside_them(
    client: Client, server: Server, store: JobStore, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    (clips / "two.txt").write_text("a square moves up\n", "utf-8")
    (clips / "notes.md").write_text("not a picture", "utf-8")
    (clips / "broken.png").write_bytes(b"no picture")
    run = client.run(batch_prompt(jobs="clips", prompts="a circle moves left"))
    assert text_of(run).startswith("2 done; 1 row cannot run\n")
    assert "broken.png" in text_of(run)
    assert {job.spec.image.name: job.spec.prompt for job in store.jobs()} == {
        "one.png": "a circle moves left",
        "two.png": "a square moves up",
    }
    assert len(videos(server)) == 2


def test_images_from_the_graph_are_jobs_too(
    client: Client, server: Server, store: JobStore, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    prompt = batch_prompt(jobs="", prompts="a circle moves left\na circle moves right", images=["both", 0])
    for name in ("one", "two"):
        prompt[name] = {"class_type": "LoadImage", "inputs": {"image": f"clips/{name}.png"}}
    prompt["both"] = {"class_type": "ImageBatch", "inputs": {"image1": ["one", 0], "image2": ["two", 0]}}
    store.set_paused(True)

    def watch(event: Event) -> None:
        """Until then the jobs wait, with pictures of their own."""
        if event.kind == "progress" and event.data["node"] == "batch" and store.paused:
            assert all(job.spec.image.is_file() for job in store.jobs())
            store.set_paused(False)

    assert text_of(client.run(prompt, watch=watch)).startswith("2 done\n")
    assert [job.spec.prompt for job in store.jobs()] == ["a circle moves left", "a circle moves right"]
    assert not any(job.spec.image.exists() for job in store.jobs())
    assert len(videos(server)) == 2


def test_a_job_that_fits_nowhere_is_set_aside_and_the_others_run(
    client: Client, server: Server, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    write_list(clips, "one.png,a circle,1,,", "one.png,a circle,1,1024x1024,64")
    prompt = batch_prompt()
    prompt["budget"]["inputs"]["budget"] = "12MiB"
    text = text_of(client.run(prompt))
    assert text.startswith("1 done, 1 failed\n")
    assert "does not fit" in text
    assert len(videos(server)) == 1


def test_several_prompts_for_one_picture_are_several_jobs(
    client: Client, server: Server, clips: Path, batch_prompt: Callable[..., Prompt]
) -> None:
    (clips / "two.png").unlink()
    run = client.run(batch_prompt(jobs="clips", prompts="a circle moves left\na circle moves right"))
    assert text_of(run).startswith("2 done\n")
    assert len(videos(server)) == 2


@pytest.mark.slow
def test_the_bundled_workflow_makes_its_videos(
    client: Client, server: Server, object_info: dict[str, Any], clips: Path
) -> None:
    assert clips.is_dir()
    workflow = json.loads((PACK / "workflows" / "i2v_batch.json").read_text("utf-8"))
    run = client.run(to_prompt(workflow, object_info))
    (output,) = (it for it in run.outputs.values() if it.get("text", [""])[0].startswith("3 done\n"))
    made = sorted((server.output_folder / "video" / "i2v_batch").glob("*.mp4"))
    assert [iio.imread(video, plugin="pyav").shape for video in made] == [(16, 96, 96, 3)] * 3
    assert all(video.name in output["text"][0] for video in made)


REFUSED = {
    "nothing": ({"jobs": ""}, "neither jobs nor images"),
    "a way out": ({"jobs": "../list.csv"}, "is not in ComfyUI's input folder"),
    "an absolute path": ({"jobs": "/etc/passwd"}, "is not in ComfyUI's input folder"),
    "no such file": ({"jobs": "clips/nowhere.csv"}, "does not exist"),
    "another file": ({"jobs": PICTURE}, "is not a list"),
    "a control character": ({"jobs": "clips/a\0.csv"}, "is not in ComfyUI's input folder"),
    "an empty folder": ({"jobs": "clips/empty"}, "no images in"),
    "a way out of the output": ({"jobs": "clips", "output_folder": "../up"}, "leads out of the output folder"),
    "no output": ({"jobs": "clips", "output_folder": " "}, "is not a valid output_folder"),
}


@pytest.mark.parametrize(("inputs", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_before_anything_runs(
    client: Client, clips: Path, batch_prompt: Callable[..., Prompt], inputs: dict[str, Any], said: str
) -> None:
    (clips / "empty").mkdir()
    with pytest.raises(PromptRefusedError) as refusal:
        client.run(batch_prompt(**inputs))
    assert list(refusal.value.node_errors) == ["batch"]
    assert said in str(refusal.value)
    assert "Remedy: " in str(refusal.value)


def test_a_picture_outside_of_the_input_folder_is_a_bad_row(
    client: Client, clips: Path, batch_prompt: Callable[..., Prompt], tmp_path: Path
) -> None:
    outside = tmp_path / "outside.png"
    Image.new("RGB", (64, 64)).save(outside)
    write_list(clips, f"{outside},a circle,1,,")
    with pytest.raises(ExecutionError, match=r"no row can run:\nline 2: the image .* is outside"):
        client.run(batch_prompt())


def test_wrong_numbers_of_prompts_are_refused(client: Client, clips: Path, batch_prompt: Callable[..., Prompt]) -> None:
    assert clips.is_dir()
    with pytest.raises(ExecutionError, match="there are 3 prompts for 2 images"):
        client.run(batch_prompt(jobs="clips", prompts="a\nb\nc"))


@pytest.mark.slow
def test_after_a_kill_the_same_workflow_goes_on(own_server: Server, batch_prompt: Callable[..., Prompt]) -> None:
    folder = own_server.input_folder / "clips"
    folder.mkdir()
    Image.new("RGB", (64, 64), "orange").save(folder / "one.png")
    write_list(folder, *(f"one.png,a circle,{seed},," for seed in range(3)))
    prompt = batch_prompt(steps=60, rule="first-come")
    queue = own_server.user_folder / "i2v_budget" / "jobs.queue"

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "batch" and done_in(queue):
            kill(own_server)

    with pytest.raises((HostError, OSError)):
        Client(own_server.url).run(prompt, watch=watch)
    assert 0 < done_in(queue) < 3
    own_server.start()
    assert text_of(Client(own_server.url).run(prompt)).startswith("3 done\n")
    assert len(videos(own_server)) == 3


def done_in(queue: Path) -> int:
    with closing(JobStore(queue)) as store:
        return store.counts()[JobState.DONE]
