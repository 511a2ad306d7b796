"""Errors that users can act on: each states the problem with its value, and the remedy."""

from __future__ import annotations

_LONGEST_CHARACTERS = 2000
"""Longest text of a problem, which holds values that users gave, of any length."""


class I2VError(Exception):
    """A mistake or a limit that the user can act on.

    `problem` states what is wrong, with the value; `remedy` states what to do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        problem = _printable(problem)
        super().__init__(f"{problem}. Remedy: {remedy}.")
        self.problem = problem
        self.remedy = remedy


def _printable(text: str) -> str:
    """Return `text` with characters escaped that cannot be encoded, and with the middle of a very long one left out."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= _LONGEST_CHARACTERS:
        return text
    half = _LONGEST_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


class BadInputError(I2VError):
    """An input whose value cannot be used."""


class ModelFolderError(I2VError):
    """A model folder that is missing, incomplete, damaged, or of another kind."""


class DoesNotFitError(I2VError):
    """No plan fits the budget; `remedy` suggests the closest settings that would."""


class RanOutError(DoesNotFitError):
    """A stage ran out of device memory, and no fallback with lower memory was left."""


class PlanMismatchError(I2VError):
    """A plan, a conditioning or a model that does not belong to the others."""


class MissingPackageError(I2VError):
    """A package that a chosen option needs is not installed."""


class FileError(I2VError):
    """A file that cannot be written, or does not hold what it should."""
