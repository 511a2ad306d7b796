"""Small models of all families. Tests of all families run for each of `SUBJECTS`, so a new family is added there."""

from __future__ import annotations

from . import i2vgen_xl, svd, wan
from .subject import DenoiserSubject, Inputs, Subject, load_with_every_parameter, make_every_parameter_matter

SUBJECTS: dict[str, Subject] = {it.name: it for it in (i2vgen_xl.SUBJECT, svd.SUBJECT, *wan.SUBJECTS)}

__all__ = [
    "SUBJECTS",
    "DenoiserSubject",
    "Inputs",
    "Subject",
    "load_with_every_parameter",
    "make_every_parameter_matter",
]
