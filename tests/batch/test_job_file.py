"""A list of jobs is checked whole: every bad row is named, and the good ones are there."""

from __future__ import annotations

import codecs
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from i2v_core.batch.jobs.job import JobSpec
from i2v_core.batch.jobs.job_file import COLUMNS, JobList, read_job_list
from i2v_core.errors import BadInputError
from i2v_core.families import FAMILIES, VideoSize

FACTS = FAMILIES["i2vgen-xl"].facts
DEFAULTS = JobSpec(
    model=Path("model"),
    image=Path("none.png"),
    prompt="",
    size=VideoSize(width_pixels=64, height_pixels=64, frames=4),
    steps=5,
    cfg=9.0,
    fps=8.0,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index, name in enumerate(("a.png", "b.jpg", "ü ö.png")):
        Image.new("RGB", (20, 10), (index, 0, 0)).save(tmp_path / name)
    return tmp_path


def listed(folder: Path, content: str | bytes, name: str = "jobs.csv") -> JobList:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_job_list(path, DEFAULTS, FACTS)


def test_csv_and_json_lines_say_the_same(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "prompt": "a cat, red", "negative": "blur", "seed": 7, "size": "96x64", "frames": 3},
        {"image": "ü ö.png", "prompt": "ein „Hund“\nbellt", "steps": 2, "cfg": 1.5, "fps": 12.5, "priority": 3},
        {"image": "b.jpg", "prompt": "x", "size": "64×72×2", "format": "gif", "allow_approximate": True},
    ]
    with (folder / "jobs.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "jobs.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows), "utf-8")
    from_csv, from_json = (read_job_list(folder / name, DEFAULTS, FACTS) for name in ("jobs.csv", "jobs.jsonl"))
    assert not from_csv.bad
    assert [job.spec for job in from_csv.jobs] == [job.spec for job in from_json.jobs]
    assert [job.line for job in from_csv.jobs] == [2, 3, 5]  # the second row has two lines
    assert [job.line for job in from_json.jobs] == [1, 3, 5]
    first, second, third = (job.spec for job in from_csv.jobs)
    assert (first.seed, first.size, first.steps) == (7, VideoSize(width_pixels=96, height_pixels=64, frames=3), 5)
    assert (second.cfg, second.fps, second.priority, second.size) == (1.5, 12.5, 3, DEFAULTS.size)
    assert second.prompt.splitlines() == ["ein „Hund“", "bellt"]
    assert (third.size.frames, third.format, third.allow_approximate) == (2, "gif", True)
    assert third.image == folder / "b.jpg"


BAD_ROWS = {
    "missing.png,x,,": "no such file",
    "a.png,,,": "there is no prompt",
    ",x,,": "there is no image",
    "a.png,x,63x64,": "63 pixels is too small",
    "a.png,x,100x64,": "not divisible by 8",
    "a.png,x,wide,": "'wide' is not a valid size",
    "a.png,x,64x64x0,": "0 frames",
    "a.png,x,,-1": "a seed of -1",
    "a.png,x,,1.5": "not a whole number",
    "a.png,x,,99999999999999999999": "is not possible",
    "a.png,x,,9999999999999999999999": "not a whole number",
    "a.png,x,,nan": "not a whole number",
    "a.png,a,b,c,d": "5 cells for 4 columns",
    "jobs.csv,x,,": "is not a picture",
    "short.png,x,,": "cannot be read",
    "nul\0.png,x,,": "cannot be read",
    ".,x,,": "cannot be read",
}


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS.items(), ids=[repr(row) for row in BAD_ROWS])
def test_a_bad_row_is_named_and_the_others_are_there(folder: Path, row: str, problem: str) -> None:
    (folder / "short.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    found = listed(folder, f"image,prompt,size,seed\na.png,one,,\n{row}\nb.jpg,two,,\n")
    assert [job.line for job in found.jobs] == [2, 4]
    assert [(bad.line, problem in bad.problem) for bad in found.bad] == [(3, True)], found.bad
    assert found.bad[0].remedy


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("frames", "-4", "-4 frames"),
        ("steps", "0", "0 steps"),
        ("steps", "NaN", "not a whole number"),
        ("cfg", "nan", "not a finite number"),
        ("cfg", "inf", "not a finite number"),
        ("cfg", "0.5", "cfg of 0.5"),
        ("fps", "0", "0 frames per second"),
        ("priority", "0", "priority of 0"),
        ("priority", "-inf", "not a finite number"),
        ("priority", "1e9", "priority of 1e+09"),
        ("scheduler", "best", "no scheduler 'best'"),
        ("precision", "fp4", "'fp4' is not a precision"),
        ("format", "avi", "'avi' is not a video format"),
        ("quality", "99", "quality of 99"),
        ("allow_approximate", "maybe", "'maybe'"),
    ],
)
def test_a_bad_value_is_named_in_either_format(folder: Path, column: str, value: str, problem: str) -> None:
    from_csv = listed(folder, f"image,prompt,{column}\na.png,x,{value}\n")
    from_json = listed(folder, json.dumps({"image": "a.png", "prompt": "x", column: value}), "jobs.jsonl")
    for found in (from_csv, from_json):
        assert not found.jobs
        assert problem in found.bad[0].problem


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"image": ["a.png"], "prompt": "x"}', "the image is"),
        ('{"image": "a.png", "prompt": "x", "colour": 1}', "no column 'colour'"),
        ('{"image": "a.png", "prompt": "x", "seed": 1, "seed": 2}', "more than once"),
        ('{"image": "a.png", "prompt": 5}', "not a text"),
        ('{"image": 3, "prompt": "x"}', "not a text"),
        ('{"image": "a.png", "prompt": "x", "seed": true}', "not a whole number"),
        ('{"image": "a.png", "prompt": "x", "cfg": NaN}', "not a finite number"),
        ('{"image": "a.png", "prompt": "\\ud800"}', "not UTF-8"),
        ("[" * 100_000, "not JSON"),
    ],
    ids=range(11),
)
def test_a_bad_line_of_json_is_named(folder: Path, line: str, problem: str) -> None:
    good = json.dumps({"image": "a.png", "prompt": "x"})
    found = listed(folder, f"{good}\n{line}\n", "jobs.jsonl")
    assert len(found.jobs) == 1
    assert (found.bad[0].line, problem in found.bad[0].problem) == (2, True), found.bad


def test_bytes_in_another_encoding_spoil_their_row_only(folder: Path) -> None:
    found = listed(folder, b"image,prompt\na.png,caf\xe9\nb.jpg,x\n")
    assert [job.line for job in found.jobs] == [3]
    assert (found.bad[0].line, "not UTF-8" in found.bad[0].problem) == (2, True)


def test_a_quotation_mark_that_is_left_open_is_named_where_it_opens(folder: Path) -> None:
    found = listed(folder, 'image,prompt\na.png,x\nb.jpg,"open\na.png,y\n')
    assert [job.line for job in found.jobs] == [2]
    assert found.bad[0].line == 3


def test_the_same_video_twice_is_named(folder: Path) -> None:
    found = listed(folder, "image,prompt,seed,priority\na.png,x,1,1\na.png,x,2,1\n./a.png,x,1,5\n")
    assert [job.line for job in found.jobs] == [2, 3]
    assert "same video as line 2" in found.bad[0].problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty"),
        (b" \n\n", "empty"),
        (codecs.BOM_UTF8, "empty"),
        (codecs.BOM_UTF16_LE + "image,prompt".encode("utf-16-le"), "UTF-16"),
        (b"image,prompt\n", "lists no jobs"),
        (b"image,prompt,image\na.png,x,a.png\n", "more than once"),
        (b"image,prompt,colour\na.png,x,red\n", "no column 'colour'"),
        (b"image;prompt\na.png;x\n", "separator is a comma"),
        (b",,\na.png,x,\n", "no header"),
        (b'"image\n', "header cannot be read"),
        (b"\n\nimage,prompt\n", "no header"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused(folder: Path, content: bytes, problem: str) -> None:
    with pytest.raises(BadInputError, match=problem):
        listed(folder, content)


@pytest.mark.parametrize("name", ["absent.csv", ".", "jobs.txt"])
def test_a_list_that_is_not_there_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(BadInputError):
        read_job_list(folder / name, DEFAULTS, FACTS)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda it: it.encode("utf-8", "replace"))))
@pytest.mark.parametrize("name", ["fuzz.csv", "fuzz.jsonl"])
def test_any_content_is_jobs_or_named_problems(folder: Path, name: str, content: bytes) -> None:
    for start in (b"", b"image,prompt\n"):
        try:
            found = listed(folder, start + content, name)
        except BadInputError:
            continue
        assert found.jobs or found.bad


def test_a_key_is_of_the_video_and_nothing_else(folder: Path) -> None:
    spec = listed(folder, "image,prompt\na.png,x\n").jobs[0].spec
    assert replace(spec, priority=5, image=Path("elsewhere/c.png")).key == spec.key
    others = [replace(spec, seed=1), replace(spec, prompt="y"), replace(spec, steps=6), replace(spec, quality=1)]
    assert len({it.key for it in (spec, *others)}) == 5
    assert JobSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec


@settings(max_examples=100)
@given(stem=st.text(min_size=1, max_size=120))
def test_an_output_is_a_plain_name(stem: str) -> None:
    name = replace(DEFAULTS, image=Path("f") / (stem.replace("/", "") + ".png")).output_name
    assert "/" not in name
    assert "\\" not in name
    assert not name.startswith(".")
    assert len(name) <= 100
    assert name.endswith(".mp4")
