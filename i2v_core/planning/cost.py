"""What a choice costs in time, as a share of the plain run: whole layers, weights in place, guidance in one pass.

The shares order candidates; they are no promise of seconds. They are estimates made before any card was at hand: a
piece of a layer costs its launches, which weigh little beside the arithmetic of levels that are large enough to be cut;
streaming at best hides behind the arithmetic, and published measurements of such schemes lie at 4 to 5 % a pass.
"""

from __future__ import annotations

from .plan import SamplePrediction, SampleSettings
from .request import Request

WEIGHT_PASS = 0.05
"""One transfer of all weights, overlapped with the arithmetic."""

# A step that calls as many layer pieces again as the plain run calls layers.
_CALLS_AGAIN = 0.01
# Skip connections to host memory and back.
_PARKED_SKIPS = 0.10


def sample_cost(request: Request, settings: SampleSettings, prediction: SamplePrediction) -> float:
    """Time of a step over the plain run's, minus one; of one clip, where several are sampled together."""
    return _cost(request, settings, calls=prediction.layer_calls / prediction.layers)


def _cost(request: Request, settings: SampleSettings, calls: float) -> float:
    passes = 1 if settings.batched_guidance else request.branches
    # Clips that are sampled together share the calls of layers, and what is streamed for them.
    cost = _CALLS_AGAIN * (calls / request.clips - 1)
    cost += WEIGHT_PASS * passes / request.clips if settings.streamed else 0
    cost += _PARKED_SKIPS if settings.offload_skips else 0
    return cost


def least_sample_cost(request: Request, way: SampleSettings) -> float:
    """What these settings cost at least, whatever the workspace: each layer called once a pass."""
    return _cost(request, way, calls=1 if way.batched_guidance else request.branches)
