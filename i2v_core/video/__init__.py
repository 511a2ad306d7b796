"""Writes videos frame by frame, into a file that exists whole or not at all."""

from __future__ import annotations

from .formats import FORMATS, VideoFormat, VideoSettings
from .sink import VideoSink, open_video

__all__ = ["FORMATS", "VideoFormat", "VideoSettings", "VideoSink", "open_video"]
