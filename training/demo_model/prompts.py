"""The small language of the demo model: one clause for each shape, joined by "and".

"a red circle moves left", "a blue square moves up and a green triangle stays".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.demo_model.clips import COLOURS, SHAPES
from training.demo_model.scenes import ACTIONS

ARTICLES = ("a", "the")
VERBS = ("moves", "slides", "goes")
WORDS = (*ARTICLES, *COLOURS, *SHAPES, *VERBS, *ACTIONS, "to", "and", "stands", "still")


@dataclass(frozen=True, kw_only=True, slots=True)
class Clause:
    """One shape and its action."""

    colour: str
    shape: str
    action: str

    def plain(self) -> str:
        """Return the wording that the model card and the benchmark use."""
        verb = "stays" if self.action == "stays" else f"moves {self.action}"
        return f"a {self.colour} {self.shape} {verb}"

    def varied(self, rng: np.random.Generator, name: str | None = None) -> str:
        """Draw a wording for training. Its last word always decides the action.

        `name` replaces colour and shape.
        """
        article = rng.choice(ARTICLES, p=(0.7, 0.3))
        verb = rng.choice(VERBS, p=(0.6, 0.2, 0.2))
        if self.action == "stays":
            way = "stays" if rng.random() < 0.7 else "stands still"
        elif self.action in ("left", "right") and rng.random() < 0.15:
            way = f"{verb} to the {self.action}"
        else:
            way = f"{verb} {self.action}"
        return f"{article} {name or f'{self.colour} {self.shape}'} {way}"


def random_clause(rng: np.random.Generator) -> Clause:
    return Clause(colour=str(rng.choice(list(COLOURS))), shape=str(rng.choice(SHAPES)), action=str(rng.choice(ACTIONS)))


def join(clauses: list[str]) -> str:
    return " and ".join(clauses)
