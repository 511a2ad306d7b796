"""Encode: what the denoiser is told."""

from __future__ import annotations

from ..families import Conditioning, I2VModel, Prompt, family_of
from ..planning.plan import Plan, Stage
from .run import running, until_it_fits
from .runtime import Runtime, StageReport


def encode(model: I2VModel, plan: Plan, prompt: Prompt, runtime: Runtime) -> tuple[Conditioning, StageReport]:
    """Prompt and picture, encoded, on the CPU."""
    family, request = family_of(model.architecture), plan.request
    with running(Stage.ENCODE, model, plan, runtime) as run:

        def attempt() -> Conditioning:
            pieces, on_chunk = run.plan.encode.picture, runtime.check_cancelled
            return family.encode(model, prompt, request.size, request.guidance, pieces, run.place, on_chunk)

        conditioning = until_it_fits(run, attempt, where=lambda: "before its end")
    return conditioning, run.report()
