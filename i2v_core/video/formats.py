"""The video formats that can be written, and the settings that a user chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import BadInputError

MAX_QUALITY = 51
_MIN_FPS, _MAX_FPS = 1.0, 120.0

# Players guess whether an untagged video is BT.601 or BT.709, so it is converted to BT.709 and tagged as such.
_BT709 = {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709", "color_range": "tv"}

FILTER_INPUT, FILTER_OUTPUT = "in", "out"
"""Names of the nodes that frames enter and leave `Filters` by."""


@dataclass(frozen=True, slots=True)
class Link:
    """A connection from one filter's output to another's input."""

    source: str
    target: str
    source_pad: int = 0
    target_pad: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """A graph of FFmpeg filters from `FILTER_INPUT` to `FILTER_OUTPUT`."""

    nodes: Mapping[str, tuple[str, str]]
    """Filter and its options, by the node's name."""

    links: tuple[Link, ...]


_TO_YUV420 = Filters(
    nodes={"convert": ("scale", "out_color_matrix=bt709:out_range=tv"), "subsample": ("format", "yuv420p")},
    links=(Link(FILTER_INPUT, "convert"), Link("convert", "subsample"), Link("subsample", FILTER_OUTPUT)),
)
# One palette per frame: a common one would need all frames at once. Ordered dither does not crawl between frames.
_TO_PALETTES = Filters(
    nodes={
        "copy": ("split", ""),
        "make_palette": ("palettegen", "stats_mode=single"),
        "apply_palette": ("paletteuse", "new=1:dither=bayer:bayer_scale=3"),
    },
    links=(
        Link(FILTER_INPUT, "copy"),
        Link("copy", "make_palette", source_pad=0),
        Link("copy", "apply_palette", source_pad=1),
        Link("make_palette", "apply_palette", target_pad=1),
        Link("apply_palette", FILTER_OUTPUT),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoding:
    """FFmpeg settings that turn frames into a file."""

    container: str
    codec: str

    pixel_format: str
    """Pixel format that the filters put out and the codec takes."""

    filters: Filters

    codec_options: Callable[[int], dict[str, str]]
    """Codec options for a `VideoSettings.quality`."""

    container_options: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoFormat:
    """One video format."""

    suffix: str
    """Ending of the file's name."""

    encoding: Encoding | None
    """None: a folder of PNG pictures in place of one file."""

    keeps_metadata: bool = True

    even_sides: bool = False
    """The codec takes even widths and heights only."""

    max_fps: float = _MAX_FPS
    """Highest frame rate that players follow."""


def _h264_options(quality: int) -> dict[str, str]:
    # A crf of 0 would be x264's lossless mode, in a profile that browsers do not play.
    return {"crf": str(max(quality, 1)), "preset": "medium", **_BT709}


def _vp9_options(quality: int) -> dict[str, str]:
    # VP9's crf goes up to 63. Without `b` 0 a default bit rate would cap the quality.
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
    # The index goes first, so that a player can begin before the download ends; and metadata keys may have any name.
    container_options=(("movflags", "use_metadata_tags+faststart"),),
)
_WEBM = Encoding(
    container="webm", codec="libvpx-vp9", pixel_format="yuv420p", filters=_TO_YUV420, codec_options=_vp9_options
)
_GIF = Encoding(container="gif", codec="gif", pixel_format="pal8", filters=_TO_PALETTES, codec_options=_no_options)

FORMATS: Mapping[str, VideoFormat] = {
    "mp4": VideoFormat(suffix=".mp4", encoding=_MP4, even_sides=True),
    "webm": VideoFormat(suffix=".webm", encoding=_WEBM),
    # GIF counts in hundredths of a second, and browsers slow down frames that are shown for less than two.
    "gif": VideoFormat(suffix=".gif", encoding=_GIF, keeps_metadata=False, max_fps=50.0),
    "png": VideoFormat(suffix="", encoding=None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSettings:
    """The user's choices for a video file.

    Raises:
        BadInputError: an unknown format, or a number out of its range.
    """

    format: str
    """A key of `FORMATS`."""

    fps: float

    quality: int = 19
    """Constant rate factor on H.264's scale: 0 is best, 51 smallest. GIF and PNG ignore it."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise BadInputError(f"'{self.format}' is not a video format", f"choose one of {', '.join(FORMATS)}")
        if not 0 <= self.quality <= MAX_QUALITY:
            raise BadInputError(
                f"a quality of {self.quality} is not possible", f"use 0 (best) to {MAX_QUALITY} (smallest file)"
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
