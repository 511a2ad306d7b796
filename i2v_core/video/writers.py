"""Writers that put pixels on the disk frame by frame: one encoded file, or a folder of pictures."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import imageio.v3 as iio
from av.filter import Graph
from av.filter.context import FilterContext
from av.video.format import VideoFormat as AvFormat
from av.video.frame import VideoFrame
from PIL.PngImagePlugin import PngInfo

from .formats import FILTER_INPUT, FILTER_OUTPUT, Encoding, Filters, VideoSettings
from .frames import Pixels

_imageio: Any = iio  # its stubs and PyAV's are only half typed, hence `Any` here and below

_PIXELS = "rgb24"  # FFmpeg's name for the layout of `Pixels`
_MAX_DENOMINATOR = 65_535  # of a frame rate: 16 bits, which every container can store exactly


class Writer(Protocol):
    """Takes frames of one size. May raise OSError, or an error of the encoder."""

    def write(self, pixels_HW3: Pixels) -> None: ...

    def finish(self) -> None:
        """Write everything that is still buffered. No frames may follow."""
        ...

    def abandon(self) -> None:
        """Close the file without completing it. Never fails; does nothing after `finish`."""
        ...


class FilmWriter:
    """Encodes frames into one file. The encoder buffers a few dozen frames at most.

    Calls PyAV itself: imageio's interface to it has no codec options, encodes the pixel format that comes in rather
    than the one that leaves the filters, and cannot close a file without completing it.
    """

    def __init__(
        self, path: Path, settings: VideoSettings, metadata: Mapping[str, str], width_pixels: int, height_pixels: int
    ) -> None:
        encoding = settings.facts.encoding
        assert encoding is not None
        rate = Fraction(settings.fps).limit_denominator(_MAX_DENOMINATOR)
        size_pixels = (width_pixels, height_pixels)
        # Opened by Python, not by FFmpeg: a failed write then raises an OSError with its errno, and `abandon` can close
        # the file first. Its name must still be the path, because `faststart` reads the file back by name.
        self._file = open(str(path), "wb")  # noqa: SIM115
        self._container: Any = None
        try:
            options = dict(encoding.container_options)
            self._container = av.open(self._file, "w", format=encoding.container, options=options)
            self._container.metadata.update(metadata)
            self._stream = _add_stream(self._container, encoding, settings.quality, rate, size_pixels)
            self._filters = _build_graph(encoding.filters, size_pixels, 1 / rate)
        except BaseException:
            self.abandon()
            raise
        self._frame_seconds = 1 / rate
        self._frames = 0

    def write(self, pixels_HW3: Pixels) -> None:
        frame = VideoFrame.from_ndarray(pixels_HW3, format=_PIXELS)
        frame.pts, frame.time_base = self._frames, self._frame_seconds
        self._frames += 1
        self._encode(frame)

    def finish(self) -> None:
        self._encode(None)
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._file.close()

    def abandon(self) -> None:
        # The file is closed before its container: closing the container would write the end of the video.
        with suppress(Exception):
            self._file.close()
        if self._container is not None:
            with suppress(Exception):
                self._container.close()

    def _encode(self, frame: VideoFrame | None) -> None:
        """Filter, encode and write a frame; None flushes the filters."""
        for filtered in _filtered(self._filters, frame):
            self._container.mux(self._stream.encode(filtered))


def _add_stream(container: Any, encoding: Encoding, quality: int, rate: Fraction, size_pixels: tuple[int, int]) -> Any:
    stream = container.add_stream(encoding.codec, rate, encoding.codec_options(quality))
    stream.width, stream.height = size_pixels
    stream.pix_fmt = encoding.pixel_format
    stream.time_base = 1 / rate
    return stream


def _build_graph(filters: Filters, size_pixels: tuple[int, int], time_base: Fraction) -> Graph:
    graph = Graph()
    width, height = size_pixels
    nodes: dict[str, FilterContext] = {
        FILTER_INPUT: graph.add_buffer(width=width, height=height, format=AvFormat(_PIXELS), time_base=time_base),
        FILTER_OUTPUT: graph.add("buffersink"),
        **{name: graph.add(filter_name, options) for name, (filter_name, options) in filters.nodes.items()},
    }
    for link in filters.links:
        nodes[link.source].link_to(nodes[link.target], link.source_pad, link.target_pad)
    graph.configure()
    return graph


def _filtered(graph: Graph, frame: VideoFrame | None) -> Generator[VideoFrame]:
    """Push a frame, or None to flush; yield those that leave the filters."""
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):  # needs more frames, or all have left
            return


class PictureWriter:
    """Writes a folder of PNG pictures `00001.png`, `00002.png` …; the first holds the metadata."""

    def __init__(self, folder: Path, metadata: Mapping[str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        self._written = 0
        self._metadata = PngInfo()
        for key, value in metadata.items():
            self._metadata.add_text(key, value)

    def write(self, pixels_HW3: Pixels) -> None:
        self._written += 1
        # Encoded in memory, written by Python: a full disk raises an OSError, and no half picture is left open.
        content = _imageio.imwrite(
            "<bytes>",
            pixels_HW3,
            plugin="pillow",
            extension=".png",
            compress_level=4,
            pnginfo=self._metadata if self._written == 1 else None,
        )
        (self._folder / f"{self._written:05}.png").write_bytes(content)

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def make_writer(
    path: Path, settings: VideoSettings, metadata: Mapping[str, str], width_pixels: int, height_pixels: int
) -> Writer:
    stored: Mapping[str, str] = metadata if settings.facts.keeps_metadata else {}
    if settings.facts.encoding is None:
        return PictureWriter(path, stored)
    return FilmWriter(path, settings, stored, width_pixels, height_pixels)
