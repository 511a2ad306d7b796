"""Errors that a user can act on: each says what is wrong, with the value, and the remedy."""

from __future__ import annotations

_LONGEST_CHARACTERS = 2000
"""Of a problem: values that users gave are in it, and may be of any length."""


class I2VError(Exception):
    """A mistake or a limit that the user can do something about.

    `problem` says what is wrong and names the value; `remedy` says what to do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        problem = _to_be_read(problem)
        super().__init__(f"{problem}. Remedy: {remedy}.")
        self.problem = problem
        self.remedy = remedy


def _to_be_read(text: str) -> str:
    """`text` without what cannot be written to a log or a socket, and with the middle of a very long one left out."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= _LONGEST_CHARACTERS:
        return text
    half = _LONGEST_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"


class BadInputError(I2VError):
    """An input whose value cannot be used."""


class ModelFolderError(I2VError):
    """A model folder that is missing, half there, damaged, or of another kind."""


class DoesNotFitError(I2VError):
    """No plan fits the budget; `remedy` names the nearest that would."""


class RanOutError(DoesNotFitError):
    """A stage ran out of device memory, even with the lowest-memory settings."""


class PlanMismatchError(I2VError):
    """A plan, a conditioning and a model that were not made for each other."""


class MissingPackageError(I2VError):
    """A package that a chosen option needs and that is not installed."""


class FileError(I2VError):
    """A file that cannot be written, or that cannot be read as what it should be."""
