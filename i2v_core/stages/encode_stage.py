"""Encode stage: turns prompt and picture into the denoiser's conditioning."""

from __future__ import annotations

from dataclasses import MISSING, fields

from ..families import Conditioning, FamilyFacts, I2VModel, Prompt, family_of
from ..planning.plan import Plan, Stage
from .run import open_stage_run, retry_with_fallback
from .runtime import Runtime, StageReport

_LABELS = {"text": "prompt", "negative_text": "negative prompt", "fps": "frames per second"}


def encode(model: I2VModel, plan: Plan, prompt: Prompt, runtime: Runtime) -> tuple[Conditioning, StageReport]:
    """Encode prompt and picture. The conditioning is on the CPU."""
    family, request = family_of(model.architecture), plan.request
    with open_stage_run(Stage.ENCODE, model, plan, runtime) as run:
        for name in _ignored_inputs(family.facts, prompt):
            run.note(f"{family.facts.display_name} takes no {name.replace('_', ' ')}: it is ignored")

        def attempt() -> Conditioning:
            tiling, on_chunk = run.plan.encode.settings.tiling, run.runtime.check_cancelled
            return family.encode(model, prompt, request.size, request.guidance, tiling, run.place, on_chunk)

        conditioning = retry_with_fallback(run, attempt, where=lambda: "before its end")
    return conditioning, run.report()


def _ignored_inputs(facts: FamilyFacts, prompt: Prompt) -> list[str]:
    """Labels of the prompt's fields that differ from their default but that the family does not use."""
    optional = [
        field for field in fields(prompt) if field.default is not MISSING and field.name not in facts.optional_inputs
    ]
    return [_LABELS.get(it.name, it.name) for it in optional if getattr(prompt, it.name) != it.default]
