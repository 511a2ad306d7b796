"""Time that settings cost, as a share of the plain run: unchunked layers, weights on the device, guidance in one pass.

The shares put candidates in order; they do not promise seconds. They are estimates made before any card was at hand:
a chunk of a layer costs its launches, which are little beside the arithmetic of layers large enough to be chunked;
streaming at best hides behind the arithmetic, and published measurements of such schemes are at 4 to 5 % a pass.
"""

from __future__ import annotations

from .plan import SamplePlan, SampleSettings
from .request import Request

WEIGHT_PASS = 0.05
"""One transfer of all weights, overlapped with the arithmetic."""

# A step that makes twice as many layer calls as the plain run.
_CALLS_AGAIN = 0.01
# Skip connections to host memory and back.
_OFFLOADED_SKIPS = 0.10


def sample_cost(request: Request, sample: SamplePlan) -> float:
    """Time of a step over the plain run's, minus one; of one clip, where several are sampled together."""
    prediction = sample.prediction
    return _cost(request, sample.settings, calls=prediction.layer_calls / prediction.layers)


def min_sample_cost(request: Request, settings: SampleSettings) -> float:
    """The least these settings cost with any workspace: each layer called once a pass."""
    return _cost(request, settings, calls=1 if settings.batched_guidance else request.branches)


def _cost(request: Request, settings: SampleSettings, calls: float) -> float:
    passes = 1 if settings.batched_guidance else request.branches
    # Clips that are sampled together share the layer calls, and the weights streamed for them.
    cost = _CALLS_AGAIN * (calls / request.clips - 1)
    cost += WEIGHT_PASS * passes / request.clips if settings.streamed else 0
    cost += _OFFLOADED_SKIPS if settings.offload_skips else 0
    return cost
