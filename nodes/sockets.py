"""The pack's own socket types, and what all its nodes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

CATEGORY = "image to video/I2V Budget"

REPORTS = "i2v_reports"
"""Where a LATENT of this pack has the reports of the stages that made it; other nodes pass it on, or leave it out."""

I2VModelSocket = io.Custom("I2V_MODEL")
I2VPlanSocket = io.Custom("I2V_PLAN")
I2VConditioningSocket = io.Custom("I2V_CONDITIONING")
I2VReportSocket = io.Custom("I2V_REPORT")


def reports_of(latent: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """The reports of the stages that made a latent; none where it was loaded, or where a node has dropped them."""
    reports = (latent or {}).get(REPORTS)
    return tuple(reports) if isinstance(reports, (list, tuple)) else ()


def report_output() -> io.Output:
    return I2VReportSocket.Output(
        "report", tooltip="What each stage of the run was predicted to take and took, for I2V Memory Report."
    )


def model_input() -> io.Input:
    return I2VModelSocket.Input("model", tooltip="The model from I2V Loader.")


def plan_input() -> io.Input:
    return I2VPlanSocket.Input(
        "plan", tooltip="The plan from VRAM Budget: size, frames, precision and how to stay within the budget."
    )
