"""Messages that are shown in English, and on a page in the page's own language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

ENGLISH: Mapping[str, str] = {
    "approximateWeights": "approximate: $formats weights",
    "approximateWindows": "approximate: context windows of $frames frames",
    "whyByHand": "moved to position $place by hand",
    "whyFirstCome": "first come, first served: waiting for $waited s",
    "whyScore": (
        "score $score = weight $weight ($seconds s ÷ $amount × priority $priority) × $ageing (waited $waited s) × "
        "$loaded (another plan ran last)"
    ),
    "whyScoreLoaded": (
        "score $score = weight $weight ($seconds s ÷ $amount × priority $priority) × $ageing (waited $waited s) × "
        "$loaded (the same plan ran last)"
    ),
    "remarkHostLeak": (
        "host memory leak: each of the last $jobs jobs left $amount behind; something in this process, likely another "
        "extension, holds on to data of finished jobs. Restart the process before memory runs out: the batch resumes "
        "where it stopped"
    ),
    "remarkCardLeak": (
        "memory leak on $card: each of the last $jobs jobs left $amount behind; something in this process, likely "
        "another extension, holds on to tensors of finished jobs. Restart the process before memory runs out: the "
        "batch resumes where it stopped"
    ),
    "remarkOccupancy": (
        "$share of device memory is in use (healthy: up to $healthy): other programs hold memory, or the reserve "
        "is too small"
    ),
    "remarkUtilisation": (
        "the device is busy $share of the time (healthy: at least $healthy): weights are streamed from host memory, or "
        "the CPU or the disk cannot keep up"
    ),
    "remarkWaiting": (
        "stages wait for device memory $share of the time (healthy: up to $healthy): jobs are too large to run at the "
        "same time"
    ),
    "remarkFailed": "$failed jobs failed, $done are done: check the errors of the first ones",
}
"""English templates by key; names of values are in lower-case letters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A template of `ENGLISH` with its values; `str` gives the English text."""

    key: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        return Template(ENGLISH[self.key]).substitute(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON: key and values for a page in another language, and the English text."""
        return {"key": self.key, "values": dict(self.values), "text": str(self)}


def message(key: str, **values: object) -> Message:
    """Return a message; values are shown as their `str`."""
    return Message(key=key, values={name: str(value) for name, value in values.items()})
