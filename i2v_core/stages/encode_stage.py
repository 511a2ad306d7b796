"""Encode: what the denoiser is told."""

from __future__ import annotations

from dataclasses import MISSING, fields

from ..families import Conditioning, FamilyFacts, I2VModel, Prompt, family_of
from ..planning.plan import Plan, Stage
from .run import retry_with_fallback, running
from .runtime import Runtime, StageReport

_IN_WORDS = {"text": "prompt", "negative_text": "negative prompt", "fps": "frames per second"}


def encode(model: I2VModel, plan: Plan, prompt: Prompt, runtime: Runtime) -> tuple[Conditioning, StageReport]:
    """Prompt and picture, encoded, on the CPU."""
    family, request = family_of(model.architecture), plan.request
    with running(Stage.ENCODE, model, plan, runtime) as run:
        for name in _without_effect(family.facts, prompt):
            run.note(f"{family.facts.display_name} takes no {name.replace('_', ' ')}: what was given has no effect")

        def attempt() -> Conditioning:
            pieces, on_chunk = run.plan.encode.settings.tiling, run.runtime.check_cancelled
            return family.encode(model, prompt, request.size, request.guidance, pieces, run.place, on_chunk)

        conditioning = retry_with_fallback(run, attempt, where=lambda: "before its end")
    return conditioning, run.report()


def _without_effect(facts: FamilyFacts, prompt: Prompt) -> list[str]:
    """The fields that have been set, to something else than their default, and that the family has no use for."""
    optional = [
        field for field in fields(prompt) if field.default is not MISSING and field.name not in facts.optional_inputs
    ]
    return [_IN_WORDS.get(it.name, it.name) for it in optional if getattr(prompt, it.name) != it.default]
