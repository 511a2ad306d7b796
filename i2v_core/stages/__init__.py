"""The three stages of a run. Each brings in what it needs, runs, and leaves nothing on the device."""

from .decode_stage import DecodeStream, decode, decode_stream
from .encode_stage import encode
from .runtime import Runtime, StageReport
from .sample_stage import MAX_STEPS, SamplerSettings, sample
from .status import StageStatus

__all__ = [
    "MAX_STEPS",
    "DecodeStream",
    "Runtime",
    "SamplerSettings",
    "StageReport",
    "StageStatus",
    "decode",
    "decode_stream",
    "encode",
    "sample",
]
