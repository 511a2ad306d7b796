"""A diffusion model's calls, run as planned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...i2v_core.memory.device import is_out_of_memory
from .call_shapes import first_tensor
from .compiling import itself_uncompiled
from .model import COPY_OF

if TYPE_CHECKING:
    from .fitted_model import FittedModel


class PlannedCall:
    """A diffusion model's own forward in chunks as planned; after an out-of-memory the same call again, cut finer."""

    def __init__(self, fit: FittedModel, forward: Callable[..., Any]) -> None:
        self._fit, self._forward = fit, forward
        setattr(self, COPY_OF, forward)

    @itself_uncompiled
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        fit, device = self._fit, first_tensor(x).device
        call = fit.prepare(x, args, kwargs)
        try:
            while True:
                try:
                    with fit.measured(call, device):
                        return self._forward(fit.model, x, *args, **kwargs)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    problem = str(error)
                # Outside of the except: the traceback keeps what the failed layer had made.
                fit.fall_back(call, problem, device)
        finally:
            fit.state.workspace_bytes = None
