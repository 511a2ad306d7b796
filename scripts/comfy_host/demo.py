"""Second half of `scripts/demo.py`, run in the environment that the first half created: runs the bundled workflow."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from . import console
from .client import Client, Event, Run
from .errors import HostError
from .server import Server
from .setup import PACK, Host
from .workflow import to_prompt

JSON = dict[str, Any]

WORKFLOW = PACK / "workflows" / "i2v_demo.json"
IMAGE = PACK / "assets" / "demo_input.png"
SERVE_POLL_SECONDS = 0.5


def play(
    host: Host,
    *,
    image: Path | None,
    prompt: str | None,
    seed: int | None,
    budget: str | None,
    out: Path,
    serve: bool,
) -> None:
    """Start `host`, run the bundled workflow, copy the video to the folder `out` and print its path.

    Arguments that are None keep the workflow's value. With `serve`, the host stays up until it ends or is interrupted.

    Raises:
        HostError: no video was made; the message says why.
    """
    _check_image(image or IMAGE)
    _make_folder(out)
    starting = console.Step("start")
    arguments = ("--preview-method", "auto")  # the host shows no previews by default
    with Server(host, arguments=arguments, waiting=lambda: starting.show("ComfyUI is starting")) as server:
        starting.done(f"ComfyUI is ready at {server.url}")
        shutil.copyfile(image or IMAGE, server.input_folder / (image or IMAGE).name)
        client = Client(server.url)
        workflow = json.loads(WORKFLOW.read_text("utf-8"))
        api_prompt = to_prompt(workflow, client.object_info())
        _set(api_prompt, "LoadImage", "image", (image or IMAGE).name)
        _set(api_prompt, "I2VEncode", "prompt", prompt)
        _set(api_prompt, "I2VChunkedSampler", "seed", seed)
        _set(api_prompt, "I2VVRAMBudget", "budget", budget)
        running = console.Step("video")
        run = _run_while_up(server, client, api_prompt, workflow, _progress(running, api_prompt))
        video = _take_video(run, server.output_folder, out)
        running.done("done")
        print(f"\n{_stages(run)}\n\n{video}")
        if serve:
            print(f"\nComfyUI is running at {server.url}. Press Ctrl-C to stop it.", flush=True)
            while server.running():
                time.sleep(SERVE_POLL_SECONDS)
            raise HostError(f"ComfyUI has ended:\n{server.log_tail()}")


def _check_image(path: Path) -> None:
    try:
        with Image.open(path) as picture:
            picture.load()
    except (UnidentifiedImageError, OSError) as error:
        raise HostError(f"{path} cannot be read as an image: {error}") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"The folder {folder} cannot be created: {error}") from error


def _set(prompt: JSON, node_type: str, name: str, value: object) -> None:
    """Set the input `name` of the prompt's only node of `node_type`, unless `value` is None."""
    if value is not None:
        (node,) = (node for node in prompt.values() if node["class_type"] == node_type)
        node["inputs"][name] = value


def _run_while_up(server: Server, client: Client, prompt: JSON, workflow: JSON, watch: Callable[[Event], None]) -> Run:
    try:
        return client.run(prompt, workflow=workflow, watch=watch, timeout_seconds=24 * 3600.0)
    except HostError as error:
        if server.running():
            raise
        raise HostError(f"{error}\nComfyUI has ended; its last lines:\n{server.log_tail()}") from error


def _progress(step: console.Step, prompt: JSON) -> Callable[[Event], None]:
    """Return a callback that shows the running node, and its progress if it reports any."""

    def watch(event: Event) -> None:
        node = prompt.get(event.data.get("node") or "")
        if node is None:
            return
        if event.kind == "executing":
            step.show(node["_meta"]["title"])
        elif event.kind == "progress":
            done, total = event.data["value"], event.data["max"]
            step.show(f"{node['_meta']['title']}  {console.bar(done, total)} {done}/{total}")

    return watch


def _take_video(run: Run, output_folder: Path, out: Path) -> Path:
    """Copy the run's video to `out` under a free name, and return its path."""
    files = [file for output in run.outputs.values() for file in output.get("images", ()) if isinstance(file, dict)]
    names = [Path(file.get("subfolder", ""), file["filename"]) for file in files if file.get("type") == "output"]
    video = next((output_folder / name for name in names if name.suffix == ".mp4"), None)
    if video is None:
        raise HostError("The run ended without a video.")
    number = 1
    while (target := out / f"i2v_{number:05d}.mp4").exists():
        number += 1
    return Path(shutil.copyfile(video, target))


def _stages(run: Run) -> str:
    stages: list[JSON] = [stage for output in run.outputs.values() for stage in output.get("i2v_stage", ())]
    rows = [
        (
            stage["stage"],
            console.size(stage["predicted_peak_bytes"]),
            console.size(stage["measured_peak_bytes"]),
            f"{stage['seconds']:.1f}",
        )
        for stage in stages
    ]
    return console.table(("stage", "predicted peak", "measured peak", "seconds"), rows)
