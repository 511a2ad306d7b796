"""What puts pixels on the disk, one frame after another: a film of one file, or a folder of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import imageio.v3 as iio
from imageio.plugins.pyav import PyAVPlugin
from PIL.PngImagePlugin import PngInfo

from .formats import Encoding, VideoSettings
from .frames import Pixels

_imageio: Any = iio  # its stubs are only half typed


class Writer(Protocol):
    """Takes frames of one size. May raise OSError, or what the encoder raises."""

    def write(self, pixels_HW3: Pixels) -> None: ...

    def finish(self) -> None:
        """Put all that is still held back on the disk. There are no more frames after that."""
        ...

    def abandon(self) -> None:
        """Let go of the file as it is. Never fails; does nothing after `finish`."""
        ...


class _Encoder(PyAVPlugin):
    """imageio's video writer, with what it has no words for: the codec's own options, and giving up."""

    def start(
        self, encoding: Encoding, fps: float, quality: int, size_pixels: tuple[int, int], metadata: Mapping[str, str]
    ) -> None:
        plugin: Any = self
        plugin.container_metadata.update(metadata)
        # The filters start from the pixels that come in; the encoder takes those that come out.
        plugin.init_video_stream(encoding.codec, fps=fps, pixel_format="rgb24")
        stream = plugin._video_stream
        stream.width, stream.height = size_pixels
        plugin.set_video_filter(**encoding.filters)
        stream.pix_fmt = encoding.pixel_format
        stream.options = encoding.codec_options(quality)

    def abandon(self) -> None:
        plugin: Any = self
        container, plugin._container, plugin._video_stream = plugin._container, None, None
        with suppress(Exception):
            plugin.request.finish()  # closed first, so that FFmpeg does not try to write its end
        if container is not None:
            with suppress(Exception):
                container.close()


class FilmWriter:
    """One file, encoded by FFmpeg through imageio and PyAV. The encoder holds back a few dozen frames at most."""

    def __init__(
        self, path: Path, settings: VideoSettings, metadata: Mapping[str, str], width_pixels: int, height_pixels: int
    ) -> None:
        encoding = settings.facts.encoding
        assert encoding is not None
        options = dict(encoding.container_options)
        self._encoder = _imageio.imopen(path, "w", plugin=_Encoder, container=encoding.container, options=options)
        try:
            self._encoder.start(encoding, settings.fps, settings.quality, (width_pixels, height_pixels), metadata)
        except BaseException:
            self._encoder.abandon()
            raise

    def write(self, pixels_HW3: Pixels) -> None:
        self._encoder.write_frame(pixels_HW3)

    def finish(self) -> None:
        self._encoder.close()

    def abandon(self) -> None:
        self._encoder.abandon()


class PictureWriter:
    """A folder of PNG pictures `00001.png`, `00002.png` …; the first holds the metadata."""

    def __init__(self, folder: Path, metadata: Mapping[str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        self._written = 0
        self._metadata = PngInfo()
        for key, value in metadata.items():
            self._metadata.add_text(key, value)

    def write(self, pixels_HW3: Pixels) -> None:
        self._written += 1
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
    kept: Mapping[str, str] = metadata if settings.facts.keeps_metadata else {}
    if settings.facts.encoding is None:
        return PictureWriter(path, kept)
    return FilmWriter(path, settings, kept, width_pixels, height_pixels)
