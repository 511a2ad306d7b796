"""Calls and results on disk: found under their key, bounded, and gone when they are not wanted any more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from i2v_core.sampling import call_record
from i2v_core.sampling.call_record import CallRecord, RunResults
from i2v_core.sampling.record_file import Record

OUTPUT = torch.arange(256.0, dtype=torch.bfloat16).view(16, 16)


def written(folder: Path, key: str, calls: int = 2) -> CallRecord:
    record = CallRecord(folder, key)
    for index in range(calls):
        assert record.add(f"call{index}", Record({"0": OUTPUT + index}, {"list": False})) is None
    assert record.write() is None
    return record


def made_at(path: Path, seconds: int) -> None:
    """Sets the time of a file or folder, which tells the newest."""
    os.utime(path, (seconds, seconds))


def test_another_process_finds_what_was_written(tmp_path: Path) -> None:
    written(tmp_path, "run")
    found = CallRecord(tmp_path, "run").find("call1")
    assert found is not None
    assert found.tensors["0"].dtype == OUTPUT.dtype
    assert torch.equal(found.tensors["0"], OUTPUT + 1)
    assert found.facts["list"] is False
    assert not CallRecord(tmp_path, "another")
    assert CallRecord(tmp_path, "run").find("call2") is None


def test_what_waits_to_be_written_is_not_on_disk(tmp_path: Path) -> None:
    record = CallRecord(tmp_path, "run")
    record.add("call", Record({"0": OUTPUT}))
    assert not record
    assert not list(tmp_path.iterdir())
    record.delete()
    assert record.write() is None
    assert not CallRecord(tmp_path, "run")


def test_a_finished_run_leaves_nothing_but_what_is_not_its_own(tmp_path: Path) -> None:
    record = written(tmp_path, "run")
    (record.folder / ".0123.part").touch()  # of a write that was cut short
    record.delete()
    assert not list(tmp_path.iterdir())
    record = written(tmp_path, "run")
    (record.folder / "notes.txt").touch()
    record.delete()
    assert [it.name for it in record.folder.iterdir()] == ["notes.txt"]


def test_abandoned_runs_go_the_oldest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(20):
        written(tmp_path, f"{index:02}")
        made_at(tmp_path / f"{index:02}", 1000 + index)
    assert sorted(it.name for it in tmp_path.iterdir()) == [f"{index:02}" for index in range(4, 20)]
    size_bytes = sum(it.stat().st_size for it in (tmp_path / "19").iterdir())
    monkeypatch.setattr(call_record, "CALLS_LIMIT_BYTES", 4 * size_bytes)
    written(tmp_path, "new")
    left = sorted(it.name for it in tmp_path.iterdir())
    assert left == ["17", "18", "19", "new"]


def test_no_more_than_the_limit_is_kept_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_record, "CALLS_LIMIT_BYTES", 3 * OUTPUT.nbytes)
    record = written(tmp_path, "run", calls=3)
    problem = record.add("one more", Record({"0": OUTPUT}))
    assert problem is not None
    assert "limit" in problem
    assert record.add("and another", Record({"0": OUTPUT})) is None, "said once"
    assert record.write() is None
    assert len(list(record.folder.iterdir())) == 3
    assert record.size_bytes == 3 * OUTPUT.nbytes


def test_results_are_kept_until_their_video_is_done(tmp_path: Path) -> None:
    results = RunResults(tmp_path)
    for key, video in (("first", "a"), ("second", "b")):
        assert results.save(key, Record({"samples": OUTPUT}, {"video": video})) is None
    results.forget(lambda video: video == "a")
    assert results.find("first") is None
    found = results.find("second")
    assert found is not None
    assert torch.equal(found.tensors["samples"], OUTPUT)


def test_old_results_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = RunResults(tmp_path)
    for index in range(20):
        results.save(f"{index:02}", Record({"samples": OUTPUT}, {"video": ""}))
        made_at(tmp_path / f"{index:02}.result.safetensors", 1000 + index)
    assert len(list(tmp_path.iterdir())) == 16
    size_bytes = next(tmp_path.iterdir()).stat().st_size
    monkeypatch.setattr(call_record, "RESULTS_LIMIT_BYTES", 3 * size_bytes)
    results.save("new", Record({"samples": OUTPUT}, {"video": ""}))
    assert sorted(it.name.partition(".")[0] for it in tmp_path.iterdir()) == ["18", "19", "new"]
