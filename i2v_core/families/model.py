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

import torch
from torch import nn

WeightFiles = Mapping[str, Path]
"""The file that a component's weights come from, by component: for those that do not come from the model's folder."""

NO_FILES: WeightFiles = MappingProxyType({})

_STORED = "stored"


@dataclass(frozen=True, slots=True)
class Architecture:
    """The configs of a model's components: all that prediction and planning need, and hashable.

    `configs` pairs a component's name with its config as canonical JSON.
    """

    family: str
    configs: tuple[tuple[str, str], ...]

    @classmethod
    def from_configs(cls, family: str, configs: Mapping[str, Mapping[str, Any]]) -> Architecture:
        return cls(family, tuple((name, json.dumps(config, sort_keys=True)) for name, config in configs.items()))

    def config(self, component: str) -> dict[str, Any]:
        return json.loads(dict(self.configs)[component])

    @property
    def stored(self) -> dict[str, dict[str, list[str]]]:
        """Of components whose weights a file holds quantised: the weights' names, by component and format."""
        return json.loads(dict(self.configs).get(_STORED, "{}"))

    def with_stored(self, stored: Mapping[str, Mapping[str, Sequence[str]]]) -> Architecture:
        """The architecture with weights that lie so. What has no weights quantised is as it would be without."""
        quantized = {component: formats for component, formats in stored.items() if formats}
        others = tuple(pair for pair in self.configs if pair[0] != _STORED)
        added = ((_STORED, json.dumps(quantized, sort_keys=True)),) if quantized else ()
        return Architecture(self.family, (*others, *added))

    @property
    def stored_formats(self) -> tuple[str, ...]:
        """The formats that weights are quantised in, that of most weights first."""
        counts: Counter[str] = Counter()
        for formats in self.stored.values():
            counts.update({name: len(weights) for name, weights in formats.items()})
        return tuple(name for name, _ in counts.most_common())

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this architecture."""
        return hashlib.sha256(repr((self.family, self.configs)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class I2VModel:
    """A loaded model. Weights lie in host RAM, in the dtype they are stored in; nothing is on the device.

    `modules` are the networks by component name; `tokenizer` is None for families without one. `files` are those
    outside of the folder that weights came from.
    """

    architecture: Architecture
    folder: Path
    modules: Mapping[str, nn.Module]
    tokenizer: Any
    files: tuple[Path, ...] = ()

    def stored_dtype(self, component: str) -> torch.dtype:
        return next(self.modules[component].parameters()).dtype
