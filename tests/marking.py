"""Which cases of a test are quick, so that `scripts/test.py --fast` runs them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_quick(cases: Iterable[Any], *, quick: int = 1) -> list[Any]:
    """The values of a `parametrize`, all but the first few of them marked slow.

    Example:
        @pytest.mark.parametrize("size", first_quick([(64, 64), (96, 64), (512, 512)]))
    """
    return [
        case if at < quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for at, case in enumerate(cases)
    ]


def quick_each(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The same for cases that begin with a model's name: the first of each model is quick."""
    seen: set[Any] = set()
    marked: list[Any] = []
    for case in cases:
        marked.append(pytest.param(*case, marks=[pytest.mark.slow] if case[0] in seen else []))
        seen.add(case[0])
    return marked
