"""Node `I2V Save Video`."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..i2v_core import stages
from ..i2v_core.errors import BadInputError
from ..i2v_core.families import I2VModel
from ..i2v_core.planning.plan import Plan, Stage
from ..i2v_core.run_report import RunReport, write_run_report
from ..i2v_core.video import VideoSettings, VideoSink, open_video
from . import host, host_files
from .sockets import CATEGORY, I2VModelSocket, I2VPlanSocket, report_output, reports_of
from .validation import checked
from .widgets import filename_prefix_input, format_input, fps_input

_DECODED = ("model", "plan", "latent")
_ABSENT: Any = object()


class SaveVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="I2VSaveVideo",
            display_name="I2V Save Video",
            category=CATEGORY,
            description="Saves a video. Connect model, plan and latent to stream each frame from the decoder into the "
            "file, so that host memory stays flat for any length; or connect images.",
            search_aliases=["save video", "export mp4", "video combine", "save gif", "save webm", "stream video"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                filename_prefix_input("video/i2v"),
                format_input("All but gif store the workflow."),
                fps_input(),
                io.Int.Input(
                    "quality",
                    default=19,
                    min=0,
                    max=51,
                    tooltip="Constant rate factor (crf) of mp4 and webm, without unit: 0 is the best quality, 51 the "
                    "smallest file; 6 less doubles the size. Not used by the other formats. Default 19.",
                ),
                I2VModelSocket.Input("model", optional=True, tooltip="To save a latent: the model from I2V Loader."),
                I2VPlanSocket.Input("plan", optional=True, tooltip="To save a latent: the plan from VRAM Budget."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent from Chunked Sampler or I2V Load Latent, decoded into the file.",
                ),
                io.Image.Input("images", optional=True, tooltip="Finished frames, in place of model, plan and latent."),
                io.Boolean.Input(
                    "memory_report",
                    default=False,
                    optional=True,
                    tooltip="Write predicted and measured memory of each stage to a JSON file next to the video. For "
                    "images there are no stages to report. Default off.",
                ),
            ],
            outputs=[
                io.String.Output("filename", tooltip="Full path of the file, or of the folder of images."),
                report_output(),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        filename_prefix: Any,
        model: Any = _ABSENT,
        plan: Any = _ABSENT,
        latent: Any = _ABSENT,
        images: Any = _ABSENT,
    ) -> bool | str:
        """Check sources and name before anything runs. The host passes None for a value that comes from another node.

        Only these inputs are parameters, since the host skips its own validation of every input named here.
        """
        sources = {"model": model, "plan": plan, "latent": latent, "images": images}
        try:
            _check_sources({name for name, value in sources.items() if value is not _ABSENT})
            if filename_prefix is not None:
                host_files.check_prefix(filename_prefix)
        except BadInputError as error:
            return str(error)
        return True

    @classmethod
    @checked
    def execute(
        cls,
        filename_prefix: str,
        format: str,
        fps: float,
        quality: int,
        model: I2VModel | None = None,
        plan: Plan | None = None,
        latent: dict[str, Any] | None = None,
        images: Tensor | None = None,
        memory_report: bool = False,
    ) -> io.NodeOutput:
        sources = {"model": model, "plan": plan, "latent": latent, "images": images}
        _check_sources({name for name, value in sources.items() if value is not None})
        settings = VideoSettings(format=format, fps=fps, quality=quality)
        width, height = _size_pixels(plan, images)
        output = host_files.new_output(filename_prefix, settings.facts.suffix, width, height)
        with open_video(output.path, settings, host_files.workflow_metadata(cls.hidden)) as sink:
            if images is not None:
                shown = _write_images(images, sink)
            else:
                assert model is not None
                assert plan is not None
                assert latent is not None
                shown = _decode_into(sink, model, plan, latent["samples"])
        report = RunReport(plan=plan, stages=(*reports_of(latent), *shown.get("i2v_stage", ())))
        if memory_report:
            write_run_report(output.path, report)
        text = "\n".join([_summary(output, sink), *shown.get("text", ())])
        return io.NodeOutput(str(output.path), report, ui={**shown, **_preview(output, sink), "text": [text]})


def _check_sources(connected: set[str]) -> None:
    """Raise `BadInputError` unless there is exactly one source of frames."""
    if connected in ({"images"}, set(_DECODED)):
        return
    found = ", ".join(name for name in (*_DECODED, "images") if name in connected)
    raise BadInputError(
        f"the source of the frames is ambiguous: {found or 'neither latent nor images'} "
        f"{'is' if ',' not in found else 'are'} connected",
        "connect either images alone, or model, plan and latent",
    )


def _size_pixels(plan: Plan | None, images: Tensor | None) -> tuple[int, int]:
    if images is not None:
        return images.shape[2], images.shape[1]
    assert plan is not None
    return plan.request.size.width_pixels, plan.request.size.height_pixels


def _write_images(images_FHWC: Tensor, sink: VideoSink) -> dict[str, list[Any]]:
    advance = host_files.frame_progress(len(images_FHWC))
    for frame_HWC in images_FHWC:
        sink.write(frame_HWC)
        advance(sink.frames)
    return {}


def _decode_into(sink: VideoSink, model: I2VModel, plan: Plan, samples: Tensor) -> dict[str, list[Any]]:
    with (
        host.stage(Stage.DECODE, model, plan) as (fitting, runtime, notes),
        stages.decode_stream(model, fitting, samples, runtime) as stream,
    ):
        for frames_FHWC in stream:
            for frame_HWC in frames_FHWC:
                sink.write(frame_HWC)
                runtime.check_cancelled()
    return host.finish_stage(stream.report(), notes)


def _preview(output: host_files.OutputPath, sink: VideoSink) -> dict[str, Any]:
    """Return what the page shows on the node: the video, or every image of a folder."""
    if output.path.is_dir():
        folder = output.name
        return {
            "images": [
                {"filename": file.name, "subfolder": folder, "type": "output"} for file in sorted(output.path.iterdir())
            ]
        }
    # The page would open a GIF in its video player if it were marked as animated.
    animated = {} if sink.settings.format == "gif" else {"animated": (True,)}
    return {"images": [output.as_result()], **animated}


def _summary(output: host_files.OutputPath, sink: VideoSink) -> str:
    width, height = sink.size_pixels
    text = f"{output.name}: {sink.frames} frames of {width}×{height}, {sink.frames / sink.settings.fps:.1f} s"
    if sink.stored_size_pixels == sink.size_pixels:
        return text
    stored_width, stored_height = sink.stored_size_pixels
    return f"{text}, stored as {stored_width}×{stored_height} since {sink.settings.format} needs even sides"
