"""Node `I2V Memory Report`."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..i2v_core.errors import BadInputError
from ..i2v_core.families import family_of
from ..i2v_core.memory_picture import draw_memory
from ..i2v_core.planning.plan import Plan
from ..i2v_core.run_report import RunReport, table_text
from . import native_runs
from .sockets import CATEGORY, I2VReportSocket, reports_of
from .validation import checked

_ABSENT: Any = object()


class MemoryReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VMemoryReport",
            display_name="I2V Memory Report",
            category=CATEGORY,
            description="Plots the device memory of a run over time, with the prediction for each stage and the limit.",
            search_aliases=["memory graph", "vram usage", "memory timeline", "vram report", "peak memory"],
            is_output_node=True,
            inputs=[
                I2VReportSocket.Input(
                    "report", optional=True, tooltip="The report from VAE Tiled Decode or I2V Save Video."
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent from Chunked Sampler, in place of a report, for a run without decoding.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The plot: memory over time and a table of stages, in GiB or MiB."),
                io.String.Output("table", tooltip="The table as text: one line per stage, in GiB or MiB, and seconds."),
            ],
        )

    @classmethod
    def validate_inputs(cls, report: Any = _ABSENT, latent: Any = _ABSENT) -> bool | str:
        """Check the sources before anything runs. The host passes None for a value that comes from another node."""
        sources = {"report": report, "latent": latent}
        try:
            _check_sources({name for name, value in sources.items() if value is not _ABSENT})
        except BadInputError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(cls, report: RunReport | None = None, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        _check_sources({name for name, value in (("report", report), ("latent", latent)) if value is not None})
        run = report or RunReport(plan=None, stages=_known_stages(latent))
        stages = run.figures()
        picture_1HW3 = torch.from_numpy(draw_memory(stages, _title(run.plan))).float()[None] / 255
        return io.NodeOutput(picture_1HW3, table_text(stages), ui=ui.PreviewImage(picture_1HW3, cls=cls))


def _check_sources(connected: set[str]) -> None:
    """Raise `BadInputError` unless exactly one is connected."""
    if len(connected) != 1:
        found = "both report and latent are" if connected else "neither report nor latent is"
        raise BadInputError(
            f"the run to show is ambiguous: {found} connected",
            "connect the report of VAE Tiled Decode or I2V Save Video, or the latent of a run without decoding",
        )


def _known_stages(latent: dict[str, Any] | None) -> tuple[Any, ...]:
    stages = reports_of(latent) or native_runs.of(latent)
    if not stages:
        raise BadInputError(
            "the latent has no report of its stages: it was loaded from a file, or another node has dropped the report",
            "connect the latent of Chunked Sampler directly, or the report of VAE Tiled Decode",
        )
    return stages


def _title(plan: Plan | None) -> str:
    if plan is None:
        return "Device memory of the run"
    return f"{family_of(plan.request.architecture).facts.display_name} {plan.request.size}, {plan.precision}"
