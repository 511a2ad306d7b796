"""Videos and latents that the real host saves: whole, with their workflow, shown on the node, and never half there."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import psutil
import pytest
from comfy_host.client import Client, Event, ExecutionError, InterruptedRunError, PromptRefusedError, Run
from comfy_host.server import Server
from PIL import Image

DECODED = {"model": ["loader", 0], "plan": ["budget", 0], "latent": ["sampler", 0]}
WORKFLOW = {"nodes": [], "version": 0.4}

MakePrompt = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def save_prompt(make_prompt: MakePrompt) -> MakePrompt:
    """Makes a prompt that ends in I2V Save Video under the name `video`; `sources` are what is connected to it."""

    def make(sources: dict[str, Any] | None = None, *, changes: dict[str, Any] | None = None, **inputs: Any) -> Any:
        prompt = make_prompt(**(changes or {}))
        del prompt["save"]
        if "images" not in (sources or {}):
            del prompt["decode"]
        inputs = {"filename_prefix": "v/clip", "format": "mp4", "fps": 8.0, "quality": 10, **inputs}
        prompt["video"] = {"class_type": "I2VSaveVideo", "inputs": inputs | (DECODED if sources is None else sources)}
        return prompt

    return make


@pytest.fixture
def output(server: Server) -> Path:
    """The host's output folder, empty."""
    folder = server.output_folder
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def files_in(folder: Path) -> list[str]:
    """All files, hidden ones included."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def shown(run: Run, folder: Path, node: str = "video") -> list[Path]:
    """The files that the page shows on a node."""
    return [folder / file["subfolder"] / file["filename"] for file in run.outputs[node]["images"]]


def pictures(run: Run, folder: Path) -> np.ndarray[Any, Any]:
    return np.stack([iio.imread(path) for path in shown(run, folder)])


def test_a_latent_becomes_a_film_with_its_workflow(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    prompt = save_prompt(changes={"sampler": {"seed": 100}})
    prompt["name"] = {"class_type": "PreviewAny", "inputs": {"source": ["video", 0]}}
    run = client.run(prompt, workflow=WORKFLOW)
    (path,) = shown(run, output)
    assert files_in(output) == ["v/clip_00001_.mp4"]
    assert run.outputs["name"]["text"] == [str(path)]
    assert run.outputs["video"]["animated"] == [True]
    assert iio.imread(path, plugin="pyav").shape == (4, 64, 64, 3)
    meta = iio.immeta(path, plugin="pyav")
    assert (meta["codec"], meta["video_format"], meta["fps"]) == ("h264", "yuv420p", 8.0)
    assert json.loads(meta["workflow"]) == WORKFLOW
    assert json.loads(meta["prompt"])["video"]["inputs"] == prompt["video"]["inputs"]


def test_it_says_what_it_wrote_and_what_decoding_took(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    run = client.run(save_prompt(changes={"sampler": {"seed": 101}}))
    (text,) = run.outputs["video"]["text"]
    assert "v/clip_00001_.mp4: 4 frames of 64×64, 0.5 s" in text
    assert "decode: predicted" in text
    (stage,) = run.outputs["video"]["i2v_stage"]
    assert stage["stage"] == "decode"
    assert 0.8 < stage["measured_peak_bytes"] / stage["predicted_peak_bytes"] < 1.2


def test_streamed_frames_are_those_of_the_decode_node(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    streamed = pictures(client.run(save_prompt(format="png")), output)
    decoded = pictures(client.run(save_prompt({"images": ["decode", 0]}, format="png")), output)
    np.testing.assert_array_equal(streamed, decoded)
    assert streamed.shape == (4, 64, 64, 3)
    assert [folder.name for folder in sorted((output / "v").iterdir())] == ["clip_00001_", "clip_00002_"]


def test_the_first_picture_of_a_folder_holds_the_workflow(
    client: Client, save_prompt: MakePrompt, output: Path
) -> None:
    run = client.run(save_prompt(format="png", filename_prefix="p"), workflow=WORKFLOW)
    assert "animated" not in run.outputs["video"]
    first, *others = shown(run, output)
    with Image.open(first) as picture:
        assert json.loads(picture.info["workflow"]) == WORKFLOW
        assert set(picture.info) == {"workflow", "prompt"}
    assert [path.name for path in others] == ["00002.png", "00003.png", "00004.png"]


@pytest.mark.parametrize(("name", "codec", "animated"), [("webm", "vp9", [True]), ("gif", "gif", None)])
def test_other_films(
    name: str, codec: str, animated: Any, client: Client, save_prompt: MakePrompt, output: Path
) -> None:
    run = client.run(save_prompt(format=name), workflow=WORKFLOW)
    (path,) = shown(run, output)
    assert iio.imread(path, plugin="pyav").shape == (4, 64, 64, 3)
    meta = {key.lower(): value for key, value in iio.immeta(path, plugin="pyav").items()}
    assert meta["codec"] == codec
    assert run.outputs["video"].get("animated") == animated
    assert ("workflow" in meta) == (name == "webm")


def test_names_count_up_and_take_dates_and_sizes(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    for seed in (110, 111):
        client.run(save_prompt(changes={"sampler": {"seed": seed}}, filename_prefix="%date%/a_%width%x%height%"))
    today = time.strftime("%Y-%m-%d")
    assert files_in(output) == [f"{today}/a_64x64_00001_.mp4", f"{today}/a_64x64_00002_.mp4"]


def stages_in(report: Path) -> list[str]:
    return [stage["stage"] for stage in json.loads(report.read_text("utf-8"))["stages"]]


def test_the_memory_report_has_every_stage_also_those_of_an_earlier_prompt(
    client: Client, save_prompt: MakePrompt, output: Path
) -> None:
    for seed in (140, 141):
        run = client.run(save_prompt(changes={"sampler": {"seed": seed}}, memory_report=True))
    assert "encode" not in run.executed
    assert files_in(output) == [f"v/clip_0000{number}_.mp4{suffix}" for number in (1, 2) for suffix in ("", ".json")]
    (video,) = shown(run, output)
    report = json.loads(video.with_name(f"{video.name}.json").read_text("utf-8"))
    assert report["video"] == video.name
    assert (report["plan"]["width"], report["plan"]["frames"]) == (64, 4)
    assert [stage["stage"] for stage in report["stages"]] == ["encode", "sample", "decode"]
    for stage in report["stages"]:
        assert 0.8 < stage["measured_peak_bytes"] / stage["predicted_peak_bytes"] < 1.2
        assert stage["seconds"] > 0
        assert stage["retries"] == stage["notes"] == []
    assert report["seconds"] == pytest.approx(sum(stage["seconds"] for stage in report["stages"]))


def test_the_memory_report_says_what_is_known_of_images_and_of_a_kept_latent(
    client: Client, save_prompt: MakePrompt, output: Path, saved_latent: Any
) -> None:
    client.run(save_prompt({"images": ["decode", 0]}, format="png", filename_prefix="i", memory_report=True))
    images = output / "i_00001_.json"
    assert stages_in(images) == []
    assert json.loads(images.read_text("utf-8"))["plan"] is None
    prompt = latent_prompt(save_prompt, "l/kept_00001_.latent [output]")
    prompt["video"]["inputs"] |= {"filename_prefix": "again", "memory_report": True}
    client.run(prompt)
    assert stages_in(output / "again_00001_.json") == ["decode"]


def test_an_odd_picture_is_padded_and_that_is_said(
    client: Client, server: Server, save_prompt: MakePrompt, output: Path
) -> None:
    Image.new("RGB", (65, 63), "teal").save(server.input_folder / "odd.png")
    prompt = save_prompt({"images": ["odd", 0]})
    prompt = {"odd": {"class_type": "LoadImage", "inputs": {"image": "odd.png"}}, "video": prompt["video"]}
    run = client.run(prompt)
    assert iio.imread(shown(run, output)[0], plugin="pyav").shape == (1, 64, 66, 3)
    assert "65×63" in run.outputs["video"]["text"][0]
    assert "stored as 66×64" in run.outputs["video"]["text"][0]


REFUSED = {
    "nothing": ({}, {}, ["neither latent nor images"]),
    "half of a latent's": ({"model": ["loader", 0], "latent": ["sampler", 0]}, {}, ["model, latent are connected"]),
    "both ways": ({**DECODED, "images": ["decode", 0]}, {}, ["model, plan, latent, images are connected"]),
    "a way out": ({"images": ["decode", 0]}, {"filename_prefix": "../up"}, ["leads out"]),
    "an absolute path": ({"images": ["decode", 0]}, {"filename_prefix": "/tmp/up"}, ["leads out"]),
    "no name": ({"images": ["decode", 0]}, {"filename_prefix": " "}, ["not a valid filename_prefix"]),
    "a folder": ({"images": ["decode", 0]}, {"filename_prefix": "a/.."}, ["not a valid filename_prefix"]),
    "a line end": ({"images": ["decode", 0]}, {"filename_prefix": "a\nb\0"}, ["not a valid filename_prefix"]),
}
"""What is connected, other inputs, and what the refusal has to say."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_saved_is_refused_before_anything_runs(
    case: str, client: Client, save_prompt: MakePrompt, output: Path
) -> None:
    sources, inputs, said = REFUSED[case]
    with pytest.raises(PromptRefusedError) as refusal:
        client.run(save_prompt(sources, **inputs))
    assert list(refusal.value.node_errors) == ["video"]
    for words in [*said, "Remedy: "]:
        assert words in str(refusal.value)
    assert files_in(output) == []


def test_a_gif_faster_than_browsers_play_is_refused(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    with pytest.raises(ExecutionError, match=r"60 frames per second .* Remedy: use 1 to 50, or another format"):
        client.run(save_prompt(format="gif", fps=60.0))
    assert files_in(output) == []


def test_a_file_in_the_folders_place_is_said(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    (output / "v").touch()
    with pytest.raises(ExecutionError) as failure:
        client.run(save_prompt(changes={"sampler": {"seed": 120}}))
    assert failure.value.exception_type.endswith("FileError")
    assert "Remedy: choose another name or folder" in failure.value.message
    assert files_in(output) == ["v"]


@contextmanager
def no_file_above(server: Server, limit_bytes: int) -> Iterator[None]:
    """The kernel fails the host's writes beyond this size, as it does those on a full disk."""
    import resource  # not there on Windows

    before = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process's files")
def test_a_disk_that_fills_up_is_said_and_the_latent_is_kept(
    client: Client, server: Server, save_prompt: MakePrompt, output: Path
) -> None:
    size_bytes = len(server.log().encode()) + (1 << 16)  # the host writes its log too
    changes = {"budget": {"width": 256, "height": 256, "frames": 16}, "sampler": {"steps": 1, "seed": 130}}
    prompt = save_prompt(changes=changes, quality=0)
    with no_file_above(server, size_bytes), pytest.raises(ExecutionError) as failure:
        client.run(prompt)
    assert failure.value.exception_type.endswith("FileError")
    assert "cannot be written: the file grew larger" in failure.value.message
    assert files_in(output) == []
    run = client.run(prompt)
    assert run.executed == ["video"]
    assert shown(run, output)[0].stat().st_size > size_bytes


def test_an_interrupted_save_leaves_nothing(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    seen: list[str] = []

    def watch(event: Event) -> None:
        if event.kind == "progress" and event.data["node"] == "video" and not seen:
            seen.extend(files_in(output))
            client.interrupt()

    changes = {"budget": {"width": 128, "height": 128, "frames": 64}, "sampler": {"steps": 1}}
    with pytest.raises(InterruptedRunError):
        client.run(save_prompt(changes=changes), watch=watch)
    assert [Path(name).suffix for name in seen] in ([], [".part"])
    assert files_in(output) == []


@pytest.mark.slow
def test_memory_stays_flat_however_long_the_clip(
    client: Client, server: Server, save_prompt: MakePrompt, output: Path
) -> None:
    """The host's highest memory use while it saves 128 frames and 1024, decoded in chunks of four."""
    process, frame_bytes = psutil.Process(server.pid), 128 * 128 * 3 * 4

    def save(frames: int) -> int:
        prompt = save_prompt({**DECODED, "latent": ["long", 0]}, changes={"budget": {"width": 128, "height": 128}})
        prompt = {name: prompt[name] for name in ("loader", "budget", "video")}
        size = {"width": 128, "height": 128, "batch_size": frames}
        prompt["long"] = {"class_type": "EmptyLatentImage", "inputs": size}
        prompt["budget"]["inputs"]["budget"] = "48MiB"
        peak_bytes = 0

        def watch(_: Event) -> None:
            nonlocal peak_bytes
            peak_bytes = max(peak_bytes, process.memory_info().rss)

        run = client.run(prompt, watch=watch)
        assert len(iio.imread(shown(run, output)[0], plugin="pyav")) == frames
        return peak_bytes

    few, many = 128, 1024
    few_bytes = save(few)
    assert save(many) - few_bytes < (many - few) * frame_bytes / 4


def latent_prompt(save_prompt: MakePrompt, file: str) -> dict[str, Any]:
    """Load a latent and save its pictures, with a plan that takes its size from the latent."""
    prompt = save_prompt({**DECODED, "latent": ["load", 0]}, format="png")
    prompt = {name: prompt[name] for name in ("loader", "budget", "video")}
    prompt["load"] = {"class_type": "I2VLoadLatent", "inputs": {"file": file}}
    prompt["budget"]["inputs"] |= {name: ["load", slot] for slot, name in enumerate(("width", "height", "frames"), 1)}
    return prompt


@pytest.fixture
def saved_latent(client: Client, save_prompt: MakePrompt, output: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    """A latent file that the host has written, and its pictures decoded at once."""
    prompt = save_prompt(format="png", changes={"budget": {"width": 96}, "sampler": {"seed": time.time_ns()}})
    inputs = {"latent": ["sampler", 0], "plan": ["budget", 0], "filename_prefix": "l/kept"}
    prompt["keep"] = {"class_type": "I2VSaveLatent", "inputs": inputs}
    run = client.run(prompt, workflow=WORKFLOW)
    (file,) = run.outputs["keep"]["latents"]
    assert "96×64×4" in run.outputs["keep"]["text"][0]
    return output / file["subfolder"] / file["filename"], pictures(run, output)


def test_a_saved_latent_is_decoded_again_alone(
    client: Client, server: Server, save_prompt: MakePrompt, output: Path, saved_latent: Any
) -> None:
    path, expected = saved_latent
    prompt = latent_prompt(save_prompt, "l/kept_00001_.latent [output]")
    run = client.run(prompt)
    assert {"encode", "sampler"} & set(run.executed) == set()
    np.testing.assert_array_equal(pictures(run, output), expected)
    shutil.copyfile(path, server.input_folder / "moved.latent")
    np.testing.assert_array_equal(pictures(client.run(latent_prompt(save_prompt, "moved.latent")), output), expected)


def test_a_latent_that_was_written_anew_is_loaded_anew(
    client: Client, save_prompt: MakePrompt, output: Path, saved_latent: Any
) -> None:
    path, _ = saved_latent
    prompt = latent_prompt(save_prompt, "l/kept_00001_.latent [output]")
    client.run(prompt)
    assert client.run(prompt).executed == []
    path.write_bytes(path.read_bytes())
    assert "load" in client.run(prompt).executed


def test_core_nodes_and_ours_read_each_others_latents(
    client: Client, server: Server, save_prompt: MakePrompt, output: Path, saved_latent: Any
) -> None:
    path, expected = saved_latent
    shutil.copyfile(path, server.input_folder / "ours.latent")
    prompt = {
        "load": {"class_type": "LoadLatent", "inputs": {"latent": "ours.latent"}},
        "keep": {"class_type": "SaveLatent", "inputs": {"samples": ["load", 0], "filename_prefix": "theirs"}},
    }
    client.run(prompt)
    run = client.run(latent_prompt(save_prompt, "theirs_00001_.latent [output]"))
    np.testing.assert_array_equal(pictures(run, output), expected)


def test_the_list_has_the_demo_and_what_was_saved(client: Client, saved_latent: Any) -> None:
    options = client.object_info()["I2VLoadLatent"]["input"]["required"]["file"][1]["options"]
    assert options[0] == "demo (bundled)"
    assert "l/kept_00001_.latent [output]" in options


def test_a_link_that_leads_nowhere_does_not_break_the_list(client: Client, output: Path) -> None:
    (output / "gone.latent").symlink_to(output / "nowhere.latent")
    assert "I2VLoadLatent" in client.object_info()


@pytest.mark.parametrize(
    "file",
    [
        "../circle.latent",
        "l/../../x.latent [output]",
        "/etc/passwd",
        "circle.png",
        "nowhere.latent",
        "nowhere.latent [output]",
        "a\0.latent",
        "",
    ],
)
def test_a_latent_that_is_none_is_refused_before_anything_runs(
    file: str, client: Client, save_prompt: MakePrompt
) -> None:
    with pytest.raises(PromptRefusedError) as refusal:
        client.run(latent_prompt(save_prompt, file))
    assert list(refusal.value.node_errors) == ["load"]
    assert "Remedy: choose another" in str(refusal.value) or "Remedy: choose one from the list" in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"\0" * 7 + b"\x80" + b"x" * 100, b"\x80\x04\x95pickle"], ids=repr)
def test_a_damaged_latent_is_said(content: bytes, client: Client, server: Server, save_prompt: MakePrompt) -> None:
    (server.input_folder / "damaged.latent").write_bytes(content)
    with pytest.raises(ExecutionError) as failure:
        client.run(latent_prompt(save_prompt, "damaged.latent"))
    assert failure.value.node_type == "I2VLoadLatent"
    assert "cut off, or no latent" in failure.value.message
    assert "Remedy: save the latent again" in failure.value.message


def test_a_latent_of_another_model_is_not_saved(client: Client, save_prompt: MakePrompt, output: Path) -> None:
    prompt = save_prompt()
    prompt["other"] = {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 4}}
    inputs = {"latent": ["other", 0], "plan": ["budget", 0], "filename_prefix": "l/other"}
    prompt = {"loader": prompt["loader"], "budget": prompt["budget"], "other": prompt["other"]}
    prompt["keep"] = {"class_type": "I2VSaveLatent", "inputs": inputs}
    with pytest.raises(ExecutionError, match=r"\(4, 16, 8, 8\)"):
        client.run(prompt)
    assert files_in(output) == []
