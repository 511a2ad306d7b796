"""Measures clips per hour: ComfyUI's own queue, with a prompt per clip, against the same clips as a batch.

    python benchmarks/host_queue.py [--clips N] [--rounds N] [--size WxH] [--frames N] [--steps N] [--threads N]

Three modes take turns on one machine with a running ComfyUI: prompts in its queue (I2V Loader to I2V Save Video, with
the loaded model kept in its cache), the same clips as a list for I2V Batch, and as a list for `python -m i2v_core
batch`, whose time includes Python's start and loading the model. Every clip has its own picture, prompt and seed.

A round before the timed ones compares the frames, as PNG. Prints a table and writes
docs/benchmarks/host-queue-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from comfy_host import console, process, setup
from comfy_host.client import Client
from comfy_host.errors import HostError
from comfy_host.server import Server

Prompt = dict[str, dict[str, Any]]

MODEL, CLIPS = "demo (bundled)", "clips"
MODEL_FOLDER = setup.PACK / "assets" / "demo_model"
CFG, FPS, SCHEDULER, QUALITY = 2.0, 8, "ddim", 19
COMPARED_CLIPS = 2
WORDS = ("left", "right", "up", "down")


class Bench:
    """Makes the clips of a round in each mode.

    `format` is that of the files that are made. The methods take the round's first seed, which differs between rounds
    so that no mode finds cached results.
    """

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        import psutil  # installed only once the environment is set up

        self.server, self.options = server, options
        self.client = Client(server.url)
        self.host = psutil.Process(server.pid)
        width, height = map(int, options.size.split("x"))
        self.format = "mp4"
        self.size = {"width": width, "height": height, "frames": options.frames}

    def through_the_queue(self, clips: int, seed: int, folder: Path) -> None:
        """Queue a prompt per clip and wait for the last one: the host runs them in order."""
        prompts = [self._clip(clip, seed + clip, folder.name) for clip in range(clips)]
        for prompt in prompts[:-1]:
            self.client.queue(prompt)
        self.client.run(prompts[-1])

    def through_the_node(self, clips: int, seed: int, folder: Path) -> None:
        self._write_list(clips, seed)
        prompt = self._planned()
        prompt["batch"] = node(
            "I2VBatch",
            model=["loader", 0],
            plan=["budget", 0],
            jobs=f"{CLIPS}/list.csv",
            prompts="",
            negative_prompt="",
            steps=self.options.steps,
            cfg=CFG,
            seed=0,
            scheduler=SCHEDULER,
            fps=FPS,
            format=self.format,
            priority=1.0,
            rule="weight",
            output_folder=folder.name,
        )
        self.client.run(prompt)

    def through_the_command(self, clips: int, seed: int, folder: Path) -> None:
        listed = self._write_list(clips, seed)
        command = [sys.executable, "-m", "i2v_core", "batch", listed, "--model", MODEL_FOLDER, "--out", folder]
        command += ["--size", self.options.size, "--frames", str(self.options.frames)]
        command += ["--steps", str(self.options.steps), "--cfg", str(CFG), "--fps", str(FPS)]
        command += ["--scheduler", SCHEDULER, "--precision", "fp32", "--quality", str(QUALITY)]
        command += ["--format", self.format]
        with tempfile.TemporaryDirectory() as queue:
            command += ["--queue", Path(queue) / "jobs.queue"]
            if process.run(command, folder=setup.PACK):
                raise HostError("The command did not make all clips.")

    def host_seconds(self) -> float:
        """Return the processor time of the host and its child processes."""
        used = self.host.cpu_times()
        return used.user + used.system + used.children_user + used.children_system

    def draw_pictures(self, clips: int) -> None:
        """Write one picture per clip: the model's picture, mirrored, turned and darkened."""
        from PIL import Image

        folder = self.server.input_folder / CLIPS
        folder.mkdir()
        with Image.open(setup.PACK / "assets" / "demo_input.png") as opened:
            picture = opened.convert("RGB")
        for clip in range(clips):
            turned = picture.transpose(Image.Transpose(clip % len(Image.Transpose)))
            turned.point(lambda value, clip=clip: max(0, value - 3 * clip)).save(folder / f"clip{clip}.png")

    def _write_list(self, clips: int, seed: int) -> Path:
        path = self.server.input_folder / CLIPS / "list.csv"
        rows = [f"clip{clip}.png,{words(clip)},{seed + clip}" for clip in range(clips)]
        path.write_text("\n".join(["image,prompt,seed", *rows]), "utf-8")
        return path

    def _planned(self) -> Prompt:
        budget = node(
            "I2VVRAMBudget",
            model=["loader", 0],
            **self.size,
            guidance=True,
            precision="fp32",
            budget="auto",
            reserve_gib=0.0,
        )
        return {"loader": node("I2VLoader", model=MODEL), "budget": budget}

    def _clip(self, clip: int, seed: int, folder: str) -> Prompt:
        made_for: dict[str, Any] = {"model": ["loader", 0], "plan": ["budget", 0]}
        return {
            **self._planned(),
            "picture": node("LoadImage", image=f"{CLIPS}/clip{clip}.png"),
            "encode": node(
                "I2VEncode", **made_for, image=["picture", 0], prompt=words(clip), negative_prompt="", fps=FPS
            ),
            "sample": node(
                "I2VChunkedSampler",
                **made_for,
                conditioning=["encode", 0],
                steps=self.options.steps,
                cfg=CFG,
                seed=seed,
                scheduler=SCHEDULER,
            ),
            "save": node(
                "I2VSaveVideo",
                **made_for,
                latent=["sample", 0],
                filename_prefix=f"{folder}/clip{clip}-",
                format=self.format,
                fps=float(FPS),
                quality=QUALITY,
            ),
        }


MODES: dict[str, Callable[[Bench, int, int, Path], None]] = {
    "the host's queue": Bench.through_the_queue,
    "I2V Batch": Bench.through_the_node,
    "the command": Bench.through_the_command,
}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def words(clip: int) -> str:
    return f"the shape moves {WORDS[clip % len(WORDS)]}"


def timed(bench: Bench, mode: str, clips: int, seed: int) -> tuple[dict[str, float], dict[int, Path]]:
    """Run a mode; return its seconds, overhead included, and its outputs by clip."""
    folder = bench.server.output_folder / f"{'_'.join(mode.split())}-{seed}".replace("'", "")
    before, children, began = bench.host_seconds(), os.times(), time.perf_counter()
    MODES[mode](bench, clips, seed, folder)
    seconds = time.perf_counter() - began
    used = os.times()  # of children that have ended; 0 on Windows
    own_seconds = used.children_user + used.children_system - children.children_user - children.children_system
    outputs = {clip: next(it for it in folder.glob(f"clip{clip}-*") if it.suffix != ".json") for clip in range(clips)}
    return {"seconds": seconds, "processor_seconds": bench.host_seconds() - before + own_seconds}, outputs


def largest_difference(plain: dict[int, Path], other: dict[int, Path]) -> int:
    """Return the largest difference of any pixel value between two sets of clips, each a folder of pictures."""
    import imageio.v3 as iio
    import numpy as np

    largest = 0
    for clip, folder in plain.items():
        pictures, others = (sorted(it.glob("*.png")) for it in (folder, other[clip]))
        for picture, alike in zip(pictures, others, strict=True):
            frame_HW3, other_HW3 = (iio.imread(it).astype(np.int16) for it in (picture, alike))
            largest = max(largest, int(np.abs(frame_HW3 - other_HW3).max()))
    return largest


def compared(bench: Bench) -> dict[str, int]:
    """Return the largest difference of each mode from the host's queue. This round also warms everything up."""
    bench.format = "png"
    made = {mode: timed(bench, mode, COMPARED_CLIPS, 0)[1] for mode in MODES}
    bench.format = "mp4"
    plain, *others = made.values()
    return {mode: largest_difference(plain, other) for mode, other in zip(list(MODES)[1:], others, strict=True)}


def measure(host: setup.Host, options: argparse.Namespace) -> dict[str, Any]:
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    os.environ.update(environment)  # for the command
    rounds: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with Server(host, environment=environment) as server:
        bench = Bench(server, options)
        bench.draw_pictures(max(options.clips, COMPARED_CLIPS))
        comfyui = bench.client.system_stats()["system"]["comfyui_version"]
        largest = compared(bench)
        for number in range(options.rounds):
            for mode in list(MODES)[
                :: -1 if number % 2 else 1
            ]:  # reversed every other round, so that no mode is always first
                figures, _ = timed(bench, mode, options.clips, 1000 * (number + 1))
                print(f"round {number + 1} of {options.rounds}, {mode}: {figures['seconds']:.1f} s", flush=True)
                rounds[mode].append({name: round(value, 2) for name, value in figures.items()})
    modes = {mode: {**summary(figures, options.clips), "rounds": figures} for mode, figures in rounds.items()}
    return {"comfyui": comfyui, "ways": modes, "largest_difference_of_255": largest}


def summary(figures: list[dict[str, float]], clips: int) -> dict[str, float]:
    seconds, used = (statistics.median(it[name] for it in figures) for name in ("seconds", "processor_seconds"))
    return {
        "clips_an_hour": round(3600 * clips / seconds, 1),
        "seconds_a_clip": round(seconds / clips, 3),
        "processor_seconds_a_clip": round(used / clips, 3),
    }


def print_table(answer: dict[str, Any]) -> None:
    head = ("", "clips an hour", "seconds a clip", "processor seconds a clip", "largest difference")
    largest = {**dict.fromkeys(MODES, "-"), **answer["largest_difference_of_255"]}
    rows = [(mode, *(str(it[key]) for key in list(it)[:3]), str(largest[mode])) for mode, it in answer["ways"].items()]
    print("\n" + console.table(head, rows))


def main() -> int:
    parser = argparse.ArgumentParser(description="Clips an hour, through ComfyUI's queue and as a batch.")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", default="128x128")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="of each operation (default: 1)")
    options = parser.parse_args()

    def compare(host: setup.Host) -> int:
        answer = measure(host, options)
        print_table(answer)
        write(answer, options)
        return 0

    return setup.run(compare)


def write(answer: dict[str, Any], options: argparse.Namespace) -> None:
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if kind == "cuda" else f"{os.cpu_count()} processor cores",
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "model": MODEL_FOLDER.name,
        **{name: getattr(options, name) for name in ("clips", "rounds", "size", "frames", "steps", "threads")},
        **answer,
    }
    output = setup.PACK / "docs" / "benchmarks" / f"host-queue-{kind}.json"
    output.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    print(f"\nwritten to {output.relative_to(setup.PACK)}")


if __name__ == "__main__":
    sys.exit(main())
