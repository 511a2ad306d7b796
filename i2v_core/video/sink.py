"""Video files that are written while their frames are being made.

Shape legend: F frames, H/W height and width in pixel space, C channels.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from av.error import FFmpegError
from torch import Tensor

from ..errors import BadInputError, FileError
from ..files import atomic_file, file_errors
from .formats import VideoSettings
from .frames import Pixels, each_frame, with_even_sides
from .writers import Writer, make_writer


class VideoSink:
    """Writes frames to a file without keeping them. Made by `open_video`.

    `frames` counts those written; `size_pixels` is their width and height, and `stored_size_pixels` the file's, which
    is larger by a pixel where the codec needs even sides.
    """

    def __init__(self, path: Path, temporary: Path, settings: VideoSettings, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.settings = settings
        self.frames = 0
        self.size_pixels = (0, 0)
        self.stored_size_pixels = (0, 0)
        self._temporary = temporary
        self._metadata = metadata
        self._writer: Writer | None = None

    def write(self, frames_FHWC: Tensor) -> None:
        """Append frames (F, H, W, 3 or 4), or one without F: floats in 0…1 or uint8.

        Raises:
            BadInputError: not pixels, a value that is not finite, or another size than the frames before.
            FileError: the file cannot be written (such as a full disk), or the encoder failed.
        """
        for pixels_HW3 in each_frame(frames_FHWC):
            self._write(pixels_HW3)

    def _write(self, pixels_HW3: Pixels) -> None:
        height, width, _ = pixels_HW3.shape
        if self.frames and self.size_pixels != (width, height):
            raise BadInputError(
                f"frame {self.frames} is {width}×{height}, those before are "
                f"{self.size_pixels[0]}×{self.size_pixels[1]} pixels",
                "give frames of one size",
            )
        if self.settings.facts.even_sides:
            pixels_HW3 = with_even_sides(pixels_HW3)
        with self._errors():
            if self._writer is None:
                stored_height, stored_width, _ = pixels_HW3.shape
                self.size_pixels, self.stored_size_pixels = (width, height), (stored_width, stored_height)
                self._writer = make_writer(self._temporary, self.settings, self._metadata, stored_width, stored_height)
            self._writer.write(pixels_HW3)
        self.frames += 1

    def finish(self) -> None:
        if self._writer is None:
            raise BadInputError("there are no frames to save", "give at least one frame")
        with self._errors():
            self._writer.finish()

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            with file_errors(self.path):
                yield
        except FFmpegError as error:
            raise FileError(
                f"{self.path} cannot be encoded as {self.settings.format} ({error})",
                "choose another format, or install the `av` package from the package index",
            ) from error


@contextmanager
def open_video(path: Path, settings: VideoSettings, metadata: Mapping[str, str] | None = None) -> Generator[VideoSink]:
    """Open a sink for frames. The video appears at `path` when the context ends; nothing does if it raises.

    Args:
        path: the file (for PNG the folder) to make. An existing file is replaced, an existing folder is not.
        settings: format, frames per second and quality.
        metadata: texts by name, stored if the format can hold them.

    Raises:
        FileError: the path cannot be written; raised before the first frame if that is known by then.
        BadInputError: no frames were written, or bad ones.
    """
    with atomic_file(path) as temporary:
        sink = VideoSink(path, temporary, settings, metadata or {})
        try:
            yield sink
            sink.finish()
        finally:
            sink.abandon()
