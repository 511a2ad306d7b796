"""The three stages of a run. Each brings in what it needs, runs, and leaves nothing on the device."""

from .batched_sampling import BatchedResult, NotWorthBatchingError, sample_batched
from .clip_sampler import MAX_STEPS, SampleRequest, SamplerSettings
from .decode_stage import DecodeStream, decode, decode_stream
from .encode_stage import encode
from .runtime import Runtime, StageReport
from .sample_stage import sample
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
