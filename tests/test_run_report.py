"""The report of a run: its content, and errors when it cannot be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from i2v_core import stages
from i2v_core.errors import BadInputError, FileError
from i2v_core.families import VideoSize, bundled_architecture
from i2v_core.memory.device import device_facts
from i2v_core.memory.timeline import Timeline
from i2v_core.planning.plan import Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.report import plan_as_dict
from i2v_core.planning.request import Budget, Request
from i2v_core.run_report import RunReport, StageFigures, write_run_report
from i2v_core.units import GIB


@pytest.fixture(scope="module")
def plan() -> Plan:
    size = VideoSize(width_pixels=64, height_pixels=64, frames=2)
    request = Request(architecture=bundled_architecture("i2vgen-xl"), size=size, precision="fp32")
    return make_plan(request, Budget(free_bytes=64 * GIB), device_facts(torch.device("cpu")))


def test_retries_and_notes_are_in_it(tmp_path: Path, plan: Plan) -> None:
    stage = stages.StageReport(
        stage=Stage.DECODE,
        plan=plan,
        predicted_peak_bytes=30,
        uncertainty_bytes=3,
        measured_peak_bytes=31,
        seconds=1.5,
        timeline=Timeline(interval_seconds=0.5, peaks_bytes=(12, 44, 31), restarts_seconds=(1.0,)),
        notes=("it went on",),
        failed=((40, 44),),
    )
    path = write_run_report(tmp_path / "clip.mp4", RunReport(plan=plan, stages=(stage.as_dict(), stage.as_dict())))
    assert path == tmp_path / "clip.mp4.json"
    report = json.loads(path.read_text("utf-8"))
    assert report["plan"] == json.loads(json.dumps(plan_as_dict(plan)))
    assert report["seconds"] == 3.0
    assert report["stages"][1] == {
        "stage": "decode",
        "predicted_peak_bytes": 30,
        "uncertainty_bytes": 3,
        "usable_bytes": 64 * GIB,
        "measured_peak_bytes": 31,
        "seconds": 1.5,
        "retries": [{"predicted_peak_bytes": 40, "measured_peak_bytes": 44}],
        "notes": ["it went on"],
        "timeline": {"interval_seconds": 0.5, "peaks_bytes": [12, 44, 31], "restarts_seconds": [1.0]},
    }
    figures = StageFigures.from_dict(report["stages"][0])
    assert (figures.stage, figures.retries, figures.timeline) == ("decode", 1, stage.timeline)


def test_a_timeline_takes_one_line_of_the_file(tmp_path: Path) -> None:
    timeline = Timeline(peaks_bytes=tuple(range(256))).as_dict()
    path = write_run_report(tmp_path / "clip.mp4", RunReport(plan=None, stages=({"seconds": 1, "timeline": timeline},)))
    text = path.read_text("utf-8")
    assert len(text.splitlines()) < 20
    assert json.loads(text)["stages"][0]["timeline"]["peaks_bytes"] == list(range(256))


@pytest.mark.parametrize("stages", [(), ({"stage": "sample"},), (5,)])
def test_a_report_without_whole_stages_is_refused(stages: Any) -> None:
    with pytest.raises(BadInputError):
        RunReport(plan=None, stages=stages).figures()


def test_a_report_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4.json").mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        write_run_report(tmp_path / "clip.mp4", RunReport(plan=None, stages=()))
