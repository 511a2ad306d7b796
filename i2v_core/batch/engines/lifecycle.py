"""What is kept of a job that is over: its report, and what it teaches."""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import BadInputError, DoesNotFitError, ModelFolderError, PlanMismatchError, RanOutError
from ...run_report import report_path
from ...stages import StageReport
from ..execution.running_job import RunningJob
from ..scheduling.estimator import Estimator


def is_permanent(error: Exception) -> bool:
    """Whether it would fail again, however often: what is asked for cannot be."""
    if isinstance(error, RanOutError):
        return False
    return isinstance(error, (BadInputError, DoesNotFitError, ModelFolderError, PlanMismatchError))


def failure_report(reports: Sequence[StageReport], error: Exception) -> dict[str, Any]:
    """What a failed job is set aside with: the stages that went well, the error, and where it came from."""
    return {
        "stages": [report.as_dict() for report in reports],
        "permanent": is_permanent(error),
        "error": f"{type(error).__name__}: {error}",
        "cause": traceback.format_exception_only(error.__cause__) if error.__cause__ else [],
    }


def found_report(output: Path) -> dict[str, Any] | None:
    """The report beside a video; None where there is none to be read."""
    try:
        report: dict[str, Any] = json.loads(report_path(output).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return report


def learn_from(flight: RunningJob, estimator: Estimator) -> None:
    """The seconds of its stages, but of those that ran out of memory in between, or were for others as well."""
    for report in flight.reports:
        if not report.failed and report.plan.request.clips == 1:
            steps = max(1, len(flight.stepped_at))
            estimator.learn(flight.spec, report.plan, report.stage, report.seconds, steps=steps)
