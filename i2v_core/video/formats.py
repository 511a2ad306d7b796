"""The kinds of video that can be written, and what a user sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInputError

MAX_QUALITY = 51
_MIN_FPS, _MAX_FPS = 1.0, 120.0

# Players take an untagged video for BT.601 or BT.709 as they please, so it is converted to BT.709 and says so.
_BT709 = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}
_TO_YUV420: dict[str, Any] = {
    "filter_sequence": [("scale", "out_color_matrix=bt709:out_range=tv"), ("format", "yuv420p")]
}
# A palette of its own for each frame: one for all would need all frames at once. Ordered dither does not crawl.
_TO_PALETTES: dict[str, Any] = {
    "filter_graph": (
        {
            "copy": ("split", ""),
            "palette": ("palettegen", "stats_mode=single"),
            "painted": ("paletteuse", "new=1:dither=bayer:bayer_scale=3"),
        },
        [
            ("video_in", "copy", 0, 0),
            ("copy", "palette", 0, 0),
            ("copy", "painted", 1, 0),
            ("palette", "painted", 0, 1),
            ("painted", "video_out", 0, 0),
        ],
    )
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoding:
    """How FFmpeg is told to make a file of frames.

    `codec_options` makes the codec's options of the quality. `filters` are arguments of imageio's `set_video_filter`.
    """

    container: str
    codec: str
    pixel_format: str
    filters: Mapping[str, Any]
    codec_options: Callable[[int], dict[str, str]]
    container_options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoFormat:
    """One kind of video. `encoding` None: not one file, but a folder of PNG pictures.

    `suffix` ends the file's name. `even_sides`: the codec takes even widths and heights only. `max_fps` is what
    players keep to.
    """

    suffix: str
    encoding: Encoding | None
    keeps_metadata: bool = True
    even_sides: bool = False
    max_fps: float = _MAX_FPS


def _h264_options(quality: int) -> dict[str, str]:
    # A crf of 0 would be x264's lossless mode, in a profile that browsers do not play.
    return {"crf": str(max(quality, 1)), "preset": "medium", **_BT709}


def _vp9_options(quality: int) -> dict[str, str]:
    # VP9's crf goes up to 63. Without `b` 0 it would be capped by a default bit rate.
    crf = round(quality * 63 / MAX_QUALITY)
    return {"crf": str(crf), "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1", **_BT709}


def _no_options(_: int) -> dict[str, str]:
    return {}


_MP4 = Encoding(
    container="mp4",
    codec="libx264",
    pixel_format="yuv420p",
    filters=_TO_YUV420,
    codec_options=_h264_options,
    # The index goes first, so that a player can begin before the end has come; and tags may have any name.
    container_options=(("movflags", "use_metadata_tags+faststart"),),
)
_WEBM = Encoding(
    container="webm", codec="libvpx-vp9", pixel_format="yuv420p", filters=_TO_YUV420, codec_options=_vp9_options
)
_GIF = Encoding(container="gif", codec="gif", pixel_format="pal8", filters=_TO_PALETTES, codec_options=_no_options)

FORMATS: Mapping[str, VideoFormat] = {
    "mp4": VideoFormat(suffix=".mp4", encoding=_MP4, even_sides=True),
    "webm": VideoFormat(suffix=".webm", encoding=_WEBM),
    # A GIF counts in hundredths of a second, and browsers slow down what stays for less than two.
    "gif": VideoFormat(suffix=".gif", encoding=_GIF, keeps_metadata=False, max_fps=50.0),
    "png": VideoFormat(suffix="", encoding=None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings:
    """What the user sets. `quality` is a constant rate factor on H.264's scale: 0 is best, 51 smallest; GIF and PNG
    have none. Raises `BadInputError` for what cannot be.
    """

    format: str
    fps: float
    quality: int = 19

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise BadInputError(f"'{self.format}' is no video format", f"choose one of {', '.join(FORMATS)}")
        if not 0 <= self.quality <= MAX_QUALITY:
            raise BadInputError(
                f"a quality of {self.quality} is not possible", f"use 0 for the best to {MAX_QUALITY} for the smallest"
            )
        max_fps = self.facts.max_fps
        if not _MIN_FPS <= self.fps <= max_fps:
            raise BadInputError(
                f"{self.fps:g} frames per second are not possible in {self.format}",
                f"use {_MIN_FPS:g} to {max_fps:g}" + (", or another format" if self.fps <= _MAX_FPS else ""),
            )

    @property
    def facts(self) -> VideoFormat:
        return FORMATS[self.format]
