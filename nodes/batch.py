"""Node `I2V Batch`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..i2v_core.batch.jobs.job import MAX_PRIORITY, JobSpec
from ..i2v_core.batch.jobs.store import FilteredJobStore
from ..i2v_core.batch.monitoring.report import summary, table
from ..i2v_core.batch.monitoring.report_picture import draw_batch
from ..i2v_core.batch.scheduling.policy import Policy
from ..i2v_core.errors import BadInputError, I2VError
from ..i2v_core.families import I2VModel, family_of
from ..i2v_core.planning.plan import Plan
from ..i2v_core.sampling.checkpoint import weights_identity
from . import batch_run, host, host_files
from .batch_device import host_devices
from .batch_jobs import check_sources, delete_used_images, jobs_of
from .host_progress import node_text_sender
from .sockets import CATEGORY, model_input, plan_input
from .validation import checked
from .widgets import (
    cfg_input,
    format_input,
    fps_input,
    negative_prompt_input,
    scheduler_input,
    seed_input,
    steps_input,
)

_ABSENT: Any = object()
OWN_DEVICE, ALL_CARDS = "ComfyUI's own", "all cards"
_ROW_DEFAULT = "For rows that leave it empty."
_PICTURE = "batch.png"


class Batch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VBatch",
            display_name="I2V Batch",
            category=CATEGORY,
            description="Makes many videos unattended, from a list, a folder of images, or images of the graph. The "
            "whole list is checked before anything starts. A job that fails does not stop the others. Run it again to "
            "continue with the jobs that are left.",
            search_aliases=["batch", "queue videos", "csv", "many videos", "folder of images", "overnight", "job list"],
            is_output_node=True,
            inputs=[
                model_input(),
                plan_input(),
                *_source_inputs(),
                negative_prompt_input(_ROW_DEFAULT, dynamic_prompts=False),
                steps_input(_ROW_DEFAULT),
                cfg_input(_ROW_DEFAULT),
                seed_input(_ROW_DEFAULT, changes_each_run=False),  # a new seed would make every video again
                scheduler_input(_ROW_DEFAULT),
                fps_input(f"The model is conditioned on the same frame rate. {_ROW_DEFAULT}"),
                format_input(_ROW_DEFAULT),
                *_queue_inputs(),
                io.Image.Input(
                    "images", optional=True, tooltip="Images from the graph, one video each, in place of jobs."
                ),
                _devices_input(),
            ],
            outputs=[
                io.String.Output("table", tooltip="Predicted and measured memory and time of each job, and errors."),
                io.String.Output("folder", tooltip="Full path of the folder with the videos."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """Return a new value each time: the inputs do not show which jobs are left. Skipping finished jobs is fast."""
        return float("nan")

    @classmethod
    def validate_inputs(cls, jobs: Any, output_folder: Any, images: Any = _ABSENT) -> bool | str:
        """Check the sources before anything runs. The host passes None for a value that comes from another node."""
        try:
            check_sources(jobs, has_images=images is not _ABSENT)
            if output_folder is not None:
                host_files.check_prefix(output_folder, "output_folder")
        except BadInputError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls,
        model: I2VModel,
        plan: Plan,
        jobs: str,
        prompts: str,
        negative_prompt: str,
        steps: int,
        cfg: float,
        seed: int,
        scheduler: str,
        fps: float,
        format: str,
        priority: float,
        rule: str,
        output_folder: str,
        images: Tensor | None = None,
        devices: str = OWN_DEVICE,
    ) -> io.NodeOutput:
        plan.check_made_for(model.architecture)
        facts = family_of(model.architecture).facts
        facts.scheduler(scheduler)
        folder = host_files.output_folder(output_folder)
        defaults = JobSpec(
            model=model.folder,
            model_identity=weights_identity(model.folder, model.files),
            image=Path(),
            prompt="",
            negative=negative_prompt,
            size=plan.request.size,
            precision=plan.request.precision,
            allow_approximate=plan.request.allow_approximate,
            steps=steps,
            cfg=cfg,
            seed=seed,
            scheduler=scheduler,
            fps=fps,
            format=format,
            priority=priority,
        )
        found = jobs_of(jobs, images, prompts, defaults, facts)
        with closing(FilteredJobStore(host.queue_file())) as store:
            batch_run.enqueue(store, (job.spec for job in found.jobs))
            cards = host_devices(plan.budget, all_cards=devices == ALL_CARDS)
            result = batch_run.run(store, model, cards, Policy(rule), folder, node_text_sender())
            counts = summary(store.counts(), found.bad)
        delete_used_images(result.records)
        rows = table(result.records, found.bad, folder)
        picture, problems = _picture(result, folder / _PICTURE)
        text = "\n".join([counts, *map(str, result.metrics.out_of_range()), *problems, rows])
        return io.NodeOutput(rows, str(folder), ui={"text": [text], **picture})


def _source_inputs() -> tuple[io.Input, ...]:
    return (
        io.String.Input(
            "jobs",
            default="",
            tooltip="Name of a list (.csv or .jsonl) or of a folder of images, in ComfyUI's input folder. Columns of "
            "a list: image and prompt; optional: negative, seed, size, frames, steps, cfg, fps, priority and others. "
            "Leave empty to use images from the graph. Default: empty.",
        ),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            tooltip="For a folder or images: one line for all, one line per image, or several lines for a single "
            "image. In a folder, a text file with the image's name takes precedence. Default: empty.",
        ),
    )


def _queue_inputs() -> tuple[io.Input, ...]:
    return (
        io.Float.Input(
            "priority",
            default=1.0,
            min=0.01,
            max=MAX_PRIORITY,
            step=0.01,
            tooltip="Scheduling weight of a job, without unit; doubling it ranks the job as if it took twice as long. "
            f"{_ROW_DEFAULT} Default 1.",
        ),
        io.Combo.Input(
            "rule",
            options=[rule.value for rule in Policy],
            default=Policy.WEIGHT.value,
            tooltip="Which job runs next: weight picks the highest predicted seconds ÷ predicted VRAM × priority, "
            "which grows while a job waits; first-come follows the list. Default weight.",
        ),
        io.String.Input(
            "output_folder",
            default="video/batch",
            tooltip="Folder for the videos, within ComfyUI's output folder. Default video/batch.",
        ),
    )


def _devices_input() -> io.Input:
    return io.Combo.Input(
        "devices",
        options=[OWN_DEVICE, ALL_CARDS],
        default=OWN_DEVICE,
        optional=True,
        tooltip="Where jobs run: on the device that ComfyUI uses, or on all cards of this machine, each within the "
        f"plan's budget. Default {OWN_DEVICE}.",
    )


def _picture(result: batch_run.BatchResult, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Draw the timeline of the batch for the node; nothing if nothing ran. Also return why it could not be drawn."""
    if not result.spans:
        return {}, []
    try:
        draw_batch(result.spans, result.metrics, path)
    except I2VError as error:
        return {}, [f"the timeline of the batch could not be drawn: {error}"]
    return {"images": [host_files.viewable(path)]}, []
