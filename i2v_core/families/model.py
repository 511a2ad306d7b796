"""A model as the rest of the pack sees it: its architecture (no weights) and its components (weights in host RAM)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

WeightFiles = Mapping[str, Path]
"""Files of weights by component, for components whose weights do not come from the model's folder."""

NO_FILES: WeightFiles = MappingProxyType({})

_STORED = "stored"


@dataclass(frozen=True, slots=True)
class Architecture:
    """The configs of a model's components: hashable, and all that prediction and planning need.

    `configs` pairs a component's name with its config as canonical JSON.
    """

    family: str
    configs: tuple[tuple[str, str], ...]

    @classmethod
    def from_configs(cls, family: str, configs: Mapping[str, Mapping[str, Any]]) -> Architecture:
        """Return the architecture of configs by component."""
        return cls(family, tuple((name, json.dumps(config, sort_keys=True)) for name, config in configs.items()))

    def config(self, component: str) -> dict[str, Any]:
        """Return a component's config."""
        return json.loads(dict(self.configs)[component])

    @property
    def stored(self) -> dict[str, dict[str, list[str]]]:
        """Names of quantised weights, by component and format."""
        return json.loads(dict(self.configs).get(_STORED, "{}"))

    def with_stored(self, stored: Mapping[str, Mapping[str, Sequence[str]]]) -> Architecture:
        """Return the architecture with these quantised weights, in the form of `stored`."""
        quantized = {component: formats for component, formats in stored.items() if formats}
        others = tuple(pair for pair in self.configs if pair[0] != _STORED)
        added = ((_STORED, json.dumps(quantized, sort_keys=True)),) if quantized else ()
        return Architecture(self.family, (*others, *added))

    @property
    def stored_formats(self) -> tuple[str, ...]:
        """Formats of quantised weights, that of most weights first."""
        counts: Counter[str] = Counter()
        for formats in self.stored.values():
            counts.update({name: len(weights) for name, weights in formats.items()})
        return tuple(name for name, _ in counts.most_common())

    @property
    def fingerprint(self) -> str:
        """A short hash of exactly this architecture."""
        return hashlib.sha256(repr((self.family, self.configs)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class I2VModel:
    """A loaded model, whose weights are in host RAM in the dtype or format that they are stored in."""

    architecture: Architecture
    folder: Path

    modules: Mapping[str, nn.Module]
    """The networks by component."""

    tokenizer: Any
    """None for families without one."""

    files: tuple[Path, ...] = ()
    """Files outside of the folder that weights were read from."""
