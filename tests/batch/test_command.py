"""`python -m i2v_core batch`: exit codes, what it says, and that it goes on when it is run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from i2v_core.batch.jobs.job import JobState
from i2v_core.batch.jobs.store import JobStore
from i2v_core.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
SMALL = ("--size", "64x64", "--frames", "2", "--steps", "2", "--device", "cpu", "--vram", "1GiB")


def write_list(folder: Path, pictures: Path, count: int, *more: Mapping[str, object]) -> Path:
    rows = [
        {"image": str(pictures / f"{seed % 3}.png"), "prompt": "a red circle", "seed": seed} for seed in range(count)
    ]
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, *more]), "utf-8")
    return path


def run(path: Path, model: Path, out: Path, *more: str) -> int:
    return main(["batch", str(path), "--model", str(model), "--out", str(out), *SMALL, *more])


def test_a_list_becomes_videos_and_once_only(
    tmp_path: Path, pictures: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_list(tmp_path, pictures, 3), tmp_path / "out"
    assert run(path, tiny_folder, out) == 0
    said = capsys.readouterr().out
    assert said.count(" done: ") == 3
    assert "3 of 3 done" in said
    assert (out / "batch.png").is_file()
    videos = {video: video.stat().st_mtime_ns for video in out.glob("*.mp4")}
    assert len(videos) == 3
    assert run(path, tiny_folder, out) == 0
    assert " done: " not in capsys.readouterr().out
    assert {video: video.stat().st_mtime_ns for video in out.glob("*.mp4")} == videos


def test_bad_rows_and_failures_are_named_and_the_rest_is_done(
    tmp_path: Path, pictures: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"image": "gone.png", "prompt": "x"}
    too_large = {"image": str(pictures / "0.png"), "prompt": "x", "size": "8192x8192", "frames": 400}
    path, out = write_list(tmp_path, pictures, 2, bad, too_large), tmp_path / "out"
    assert run(path, tiny_folder, out, "--rule", "first-come", "--one-by-one", "--format", "gif") == 1
    said = capsys.readouterr().out
    assert "jobs.jsonl, line 3: the picture" in said
    assert "does not fit" in said
    assert "2 of 3 done" in said
    assert len(list(out.glob("*.gif"))) == 2


def test_what_failed_is_tried_again_when_that_is_asked_for(
    tmp_path: Path, pictures: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes((pictures / "0.png").read_bytes())
    path, out = write_list(tmp_path, pictures, 0, {"image": "p.png", "prompt": "x"}), tmp_path / "out"
    assert run(path, tiny_folder, out) == 0
    store = JobStore(out / "jobs.queue")
    (job,) = store.jobs()
    assert job.output is not None
    job.output.unlink()
    with store.database.transaction() as connection:
        connection.execute("UPDATE jobs SET state = 'failed', problem = 'the disk was full'")
    store.close()
    assert run(path, tiny_folder, out) == 1
    assert "the disk was full" in capsys.readouterr().out
    assert run(path, tiny_folder, out, "--retry") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--size", "65x64"), "not divisible"),
        (("--size", "large"), "'large' is not a valid size"),
        (("--frames", "0"), "0 frames"),
        (("--steps", "0"), "0 steps"),
        (("--vram", "much"), "not an amount of memory"),
        (("--device", "abacus"), "'abacus' cannot be used"),
        (("--attempts", "0"), "--attempts 0"),
        (("--clips-at-once", "0"), "0 clips at once"),
        (("--clips-at-once", "many"), "many clips at once"),
        (("--ray", "local"), "does not go with --ray"),
    ],
)
def test_arguments_that_cannot_be_exit_with_2(
    tmp_path: Path,
    pictures: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    assert run(write_list(tmp_path, pictures, 1), tiny_folder, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err


def test_a_list_of_which_nothing_can_run_exits_with_2(
    tmp_path: Path, pictures: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "absent.csv", tiny_folder, tmp_path / "out") == 2
    assert run(write_list(tmp_path, pictures, 0, {"prompt": "x"}), tiny_folder, tmp_path / "out") == 2
    assert run(write_list(tmp_path, pictures, 1), tmp_path / "no model", tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "line 1: there is no image" in captured.out
    assert captured.err.count("Remedy") == 3
    assert not (tmp_path / "out").exists()


def started(path: Path, model: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "i2v_core", "batch", str(path), "--model", str(model), "--out", str(out), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has neither of these signals")
@pytest.mark.parametrize(("end", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_it_goes_on_after_an_interrupt_or_a_kill(
    tmp_path: Path, pictures: Path, tiny_folder: Path, end: signal.Signals, code: int, survived: Counter[str]
) -> None:
    path, out = write_list(tmp_path, pictures, 12), tmp_path / "out"
    process = started(path, tiny_folder, out)
    assert process.stdout is not None
    assert " done: " in process.stdout.readline()
    process.send_signal(end)
    process.stdout.read()
    assert process.wait(60) == code
    store = JobStore(out / "jobs.queue")
    done = {job.output: job.output.stat().st_mtime_ns for job in store.jobs(JobState.DONE) if job.output}
    assert 1 <= len(done) < 12
    if end is signal.SIGINT:
        assert store.counts()[JobState.RUNNING] == 0
    store.close()
    assert run(path, tiny_folder, out) == 0
    assert all(output.stat().st_mtime_ns == at for output, at in done.items())
    assert len(list(out.glob("*.mp4"))) == 12
    if end is signal.SIGINT:
        assert not list(out.glob(".*"))
    survived["interrupted batches"] += 1


@pytest.mark.slow
def test_two_processes_on_one_queue_make_each_video_once(tmp_path: Path, pictures: Path, tiny_folder: Path) -> None:
    path, out = write_list(tmp_path, pictures, 8), tmp_path / "out"
    processes = [started(path, tiny_folder, out) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    done = [line.split(" done: ")[1] for text in said for line in text.splitlines() if " done: " in line]
    assert sorted(done) == sorted(str(video) for video in out.glob("*.mp4"))
    assert len(done) == 8
    assert all("8 of 8 done" in text for text in said)
