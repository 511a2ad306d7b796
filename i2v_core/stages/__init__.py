"""The three stages of a run: encode, sample, decode. Each places its components, runs, and leaves the device empty."""

from .clip_sampler import MAX_STEPS, SampleRequest, SamplerSettings
from .decode_stage import DecodeStream, decode, decode_stream
from .encode_stage import encode
from .runtime import Runtime, StageReport
from .sample_stage import BatchedResult, NotWorthBatchingError, sample, sample_batched
from .status import StageStatus

__all__ = [
    "MAX_STEPS",
    "BatchedResult",
    "DecodeStream",
    "NotWorthBatchingError",
    "Runtime",
    "SampleRequest",
    "SamplerSettings",
    "StageReport",
    "StageStatus",
    "decode",
    "decode_stream",
    "encode",
    "sample",
    "sample_batched",
]
