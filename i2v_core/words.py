"""Messages that are shown in English, and on a page in the page's own language."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template
from typing import Any

ENGLISH: Mapping[str, str] = {
    "approximateWeights": "approximate: $formats weights",
    "approximateWindows": "approximate: context windows of $frames frames",
    "whyByHand": "put at place $place by hand",
    "whyFirstCome": "first come, first served: waiting for $waited s",
    "whyScore": (
        "score $score = weight $weight ($seconds s ÷ $amount × priority $priority) × $ageing for $waited s of "
        "waiting × $loaded since another plan ran last"
    ),
    "whyScoreLoaded": (
        "score $score = weight $weight ($seconds s ÷ $amount × priority $priority) × $ageing for $waited s of "
        "waiting × $loaded since its plan ran last"
    ),
    "remarkHostLeak": (
        "host memory is not given back: $amount more are held after each job (of the last $jobs): something in "
        "this process keeps what jobs have made, likely an extension; start the process anew before memory runs "
        "out, the batch goes on where it was"
    ),
    "remarkCardLeak": (
        "memory of $card is not given back: $amount more are held after each job (of the last $jobs): something "
        "in this process keeps tensors of jobs that are over, likely an extension; start the process anew before "
        "memory runs out, the batch goes on where it was"
    ),
    "remarkOccupancy": (
        "$share of device memory is in use (healthy: up to $healthy): other programs hold memory, or the reserve "
        "is too small"
    ),
    "remarkUtilisation": (
        "the device computes $share of the time (healthy: from $healthy): weights stream from host memory, or the"
        " processor or the disk cannot keep up"
    ),
    "remarkWaiting": (
        "stages wait for room $share of their time (healthy: up to $healthy): jobs are too large to run beside "
        "one another"
    ),
    "remarkFailed": "$failed jobs have failed and $done are done: look at what the first ones say",
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
