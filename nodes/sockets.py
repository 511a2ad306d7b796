"""Socket types of the pack, and inputs and outputs that its nodes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

CATEGORY = "image to video/I2V Budget"

REPORTS = "i2v_reports"
"""Key of a LATENT under which this pack stores the reports of its stages; other nodes pass it on or drop it."""

I2VModelSocket = io.Custom("I2V_MODEL")
I2VPlanSocket = io.Custom("I2V_PLAN")
I2VConditioningSocket = io.Custom("I2V_CONDITIONING")
I2VReportSocket = io.Custom("I2V_REPORT")


def reports_of(latent: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """Return the reports of the stages that made a latent; empty if it was loaded, or a node has dropped them."""
    reports = (latent or {}).get(REPORTS)
    return tuple(reports) if isinstance(reports, (list, tuple)) else ()


def report_output() -> io.Output:
    return I2VReportSocket.Output(
        "report", tooltip="Predicted and measured memory of each stage, for I2V Memory Report."
    )


def model_input() -> io.Input:
    return I2VModelSocket.Input("model", tooltip="The model from I2V Loader.")


def plan_input() -> io.Input:
    return I2VPlanSocket.Input(
        "plan", tooltip="The plan from VRAM Budget: size, frames, precision, and the settings that fit the budget."
    )
