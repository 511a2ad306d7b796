"""The report of a run: what is written, and what is left where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from i2v_core import stages
from i2v_core.errors import FileError
from i2v_core.families import VideoSize, bundled_architecture
from i2v_core.memory.device import device_facts
from i2v_core.planning.plan import Plan, Stage
from i2v_core.planning.planner import make_plan
from i2v_core.planning.request import Budget, Request
from i2v_core.run_report import write_run_report
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
        notes=("it went on",),
        failed=((40, 44),),
    )
    path = write_run_report(tmp_path / "clip.mp4", plan, [stage.as_dict(), stage.as_dict()])
    assert path == tmp_path / "clip.mp4.json"
    report = json.loads(path.read_text("utf-8"))
    assert report["plan"] == json.loads(json.dumps(plan.as_dict()))
    assert report["seconds"] == 3.0
    assert report["stages"][1] == {
        "stage": "decode",
        "predicted_peak_bytes": 30,
        "uncertainty_bytes": 3,
        "measured_peak_bytes": 31,
        "seconds": 1.5,
        "retries": [{"predicted_peak_bytes": 40, "measured_peak_bytes": 44}],
        "notes": ["it went on"],
    }


def test_a_report_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4.json").mkdir()
    with pytest.raises(FileError, match="cannot be written"):
        write_run_report(tmp_path / "clip.mp4", None, [])
