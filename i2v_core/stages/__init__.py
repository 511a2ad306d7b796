"""The three stages of a run. Each brings in what it needs, runs, and leaves nothing on the device."""

from .clip import MAX_STEPS, Clip, SamplerSettings
from .decode_stage import DecodeStream, decode, decode_stream
from .encode_stage import encode
from .runtime import Runtime, StageReport
from .sample_stage import sample
from .status import StageStatus
from .together import DoesNotPayError, Together, sample_together

__all__ = [
    "MAX_STEPS",
    "Clip",
    "DecodeStream",
    "DoesNotPayError",
    "Runtime",
    "SamplerSettings",
    "StageReport",
    "StageStatus",
    "Together",
    "decode",
    "decode_stream",
    "encode",
    "sample",
    "sample_together",
]
