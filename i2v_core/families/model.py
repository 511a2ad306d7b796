"""A model as the rest of the pack sees it: its architecture (no weights) and its components (weights in host RAM)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


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
    def fingerprint(self) -> str:
        """A short name for exactly this architecture."""
        return hashlib.sha256(repr((self.family, self.configs)).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class I2VModel:
    """A loaded model. Weights lie in host RAM, in the dtype they are stored in; nothing is on the device.

    `modules` are the networks by component name; `tokenizer` is None for families without one.
    """

    architecture: Architecture
    folder: Path
    modules: Mapping[str, nn.Module]
    tokenizer: Any

    def stored_dtype(self, component: str) -> torch.dtype:
        return next(self.modules[component].parameters()).dtype
