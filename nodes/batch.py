"""I2V Batch."""

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
from .batch_jobs import check_sources, forget_pictures, jobs_of
from .host_progress import words_on_the_node
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
_OF_ROWS = "For rows that do not say it."
_PICTURE = "batch.png"


class Batch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VBatch",
            display_name="I2V Batch",
            category=CATEGORY,
            description="Makes many videos unattended, from a list, a folder of pictures or images. The list is "
            "checked whole before anything starts; a video that fails does not stop the others; run again, it goes on "
            "with what is left.",
            search_aliases=["batch", "queue videos", "csv", "many videos", "folder of images", "overnight", "job list"],
            is_output_node=True,
            inputs=[
                model_input(),
                plan_input(),
                *_source_inputs(),
                negative_prompt_input(_OF_ROWS, dynamic_prompts=False),
                steps_input(_OF_ROWS),
                cfg_input(_OF_ROWS),
                seed_input(_OF_ROWS, another_each_run=False),  # which would make every video anew
                scheduler_input(_OF_ROWS),
                fps_input(f"The model is told to imagine motion at as many. {_OF_ROWS}"),
                format_input(_OF_ROWS),
                *_queue_inputs(),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures from the graph, a video for each, in place of jobs."
                ),
                _devices_input(),
            ],
            outputs=[
                io.String.Output("table", tooltip="What each job was predicted to take and took, and what went wrong."),
                io.String.Output("folder", tooltip="Full path of the folder with the videos."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> Any:
        """Another each time: what is left of the jobs is not in the inputs. Of finished jobs it is told in a moment."""
        return float("nan")

    @classmethod
    def validate_inputs(cls, jobs: Any, output_folder: Any, images: Any = _ABSENT) -> bool | str:
        """Said before anything runs. The host gives None for what comes from another node."""
        try:
            check_sources(jobs, has_images=images is not _ABSENT)
            if output_folder is not None:
                host_files.check_prefix(output_folder, "an output_folder")
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
        with closing(FilteredJobStore(host.queue_file())) as part:
            batch_run.asked_again(part, (job.spec for job in found.jobs))
            cards = host_devices(plan.budget, all_cards=devices == ALL_CARDS)
            outcome = batch_run.run(part, model, cards, Policy(rule), folder, words_on_the_node())
            words = summary(part.counts(), found.bad)
        forget_pictures(outcome.records)
        rows = table(outcome.records, found.bad, folder)
        picture, remarks = _picture(outcome, folder / _PICTURE)
        text = "\n".join([words, *map(str, outcome.figures.out_of_range()), *remarks, rows])
        return io.NodeOutput(rows, str(folder), ui={"text": [text], **picture})


def _source_inputs() -> tuple[io.Input, ...]:
    return (
        io.String.Input(
            "jobs",
            default="",
            tooltip="A list (.csv or .jsonl) or a folder of pictures, by its name in ComfyUI's input folder. "
            "Columns of a list: image, prompt, and where wanted negative, seed, size, frames, steps, cfg, fps, "
            "priority and others. Empty for images from the graph. Default: empty.",
        ),
        io.String.Input(
            "prompts",
            multiline=True,
            default="",
            tooltip="For a folder or images: one line for all, one for each, or several for the only picture. "
            "A text file of a picture's name in the folder goes before. Default: empty.",
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
            tooltip=f"Weight of a job against others: twice as much counts as twice as long. {_OF_ROWS} Default 1.",
        ),
        io.Combo.Input(
            "rule",
            options=[rule.value for rule in Policy],
            default=Policy.WEIGHT.value,
            tooltip="Which job comes next: weight takes the largest of predicted seconds ÷ predicted VRAM × "
            "priority, which grows while a job waits; first-come goes by the list. Default weight.",
        ),
        io.String.Input(
            "output_folder",
            default="video/batch",
            tooltip="Folder in ComfyUI's output folder for the videos. Default video/batch.",
        ),
    )


def _devices_input() -> io.Input:
    return io.Combo.Input(
        "devices",
        options=[OWN_DEVICE, ALL_CARDS],
        default=OWN_DEVICE,
        optional=True,
        tooltip="Where jobs run: on the card that ComfyUI uses, or on every card of this machine, each within the "
        f"plan's budget. Default {OWN_DEVICE}.",
    )


def _picture(outcome: batch_run.BatchResult, path: Path) -> tuple[dict[str, Any], list[str]]:
    """What ran when, for the node; without one where nothing ran, and what went wrong where it cannot be made."""
    if not outcome.spans:
        return {}, []
    try:
        draw_batch(outcome.spans, outcome.figures, path)
    except I2VError as error:
        return {}, [f"there is no picture of the batch: {error}"]
    return {"images": [host_files.viewable(path)]}, []
