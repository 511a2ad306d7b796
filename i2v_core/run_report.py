"""What the stages of a run were predicted to take and took, as JSON beside its video."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import file_errors, whole_file
from .planning.plan import Plan

_VERSION = 1


def report_path(video: Path) -> Path:
    """`NAME.mp4.json` beside `NAME.mp4`; likewise of a folder of pictures."""
    return video.with_name(f"{video.name}.json")


def write_run_report(video: Path, plan: Plan | None, stages: Sequence[Mapping[str, Any]]) -> Path:
    """Write what is known of a video's run; the file's path.

    Args:
        video: the file, or the folder of pictures, beside which the report goes.
        plan: the one that the run began with; None where the video was not decoded here.
        stages: `StageReport.as_dict` of each stage that is known, in order.

    Raises:
        FileError: it cannot be written; then there is none.
    """
    path = report_path(video)
    content = {
        "version": _VERSION,
        "video": video.name,
        "plan": plan.as_dict() if plan else None,
        "stages": list(stages),
        "seconds": sum(float(stage["seconds"]) for stage in stages),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with whole_file(path) as temporary, file_errors(path):
        temporary.write_text(text + "\n", "utf-8")
    return path
