"""Calibration: how far measured peaks were from predicted ones, by card and model.

The store is one JSON file that holds, for every key (card, versions, model) and stage, the last ratios of measured to
predicted peak. A file that cannot be read is set aside, never fatal.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import FileError
from ..files import atomic_file, file_errors, set_aside

logger = logging.getLogger(__name__)

_VERSION = 1
_KEPT_RATIOS = 20
# A ratio beyond these is no inaccuracy of the prediction: another run than the predicted one was measured (such as a
# cfg of 1 in a plan with guidance), or something went wrong.
_MIN_RATIO, _MAX_RATIO = 0.8, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRatios:
    """Lowest and highest ratio of measured to predicted peak of one stage over the last runs, and their number."""

    stage: str
    lowest: float
    highest: float
    runs: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """Ratios by stage for one model on one card; empty before the first run."""

    stages: tuple[StageRatios, ...] = ()

    def of(self, stage: str) -> StageRatios | None:
        """Return the ratios of a stage; None where there are none."""
        return next((ratios for ratios in self.stages if ratios.stage == stage), None)


UNCALIBRATED = Calibration()


def calibration_key(device_name: str, model_fingerprint: str) -> str:
    """Return the key whose runs share their ratios: the same card, driver and torch, and the same model."""
    driver = torch.version.cuda or torch.version.hip or "none"
    return f"{device_name} | cuda {driver} | torch {torch.__version__} | {model_fingerprint}"


class CalibrationStore:
    """Ratios in a JSON file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def calibration(self, key: str) -> Calibration:
        """Return the ratios of a key."""
        stages = self._read().get(key, {})
        return Calibration(
            tuple(
                StageRatios(stage=stage, lowest=min(ratios), highest=max(ratios), runs=len(ratios))
                for stage, ratios in sorted(stages.items())
                if ratios
            )
        )

    def record(self, key: str, stage: str, *, predicted_bytes: int, measured_bytes: int) -> None:
        """Add the peak of one run. A ratio out of range, or a file that cannot be written, is logged and ignored."""
        ratio = measured_bytes / max(predicted_bytes, 1)
        if not _MIN_RATIO <= ratio <= _MAX_RATIO:
            logger.info("%s took %.2f times what was predicted; this is not recorded", stage, ratio)
            return
        entries = self._read()
        ratios = entries.setdefault(key, {}).setdefault(stage, [])
        entries[key][stage] = [*ratios, round(ratio, 4)][-_KEPT_RATIOS:]
        content = json.dumps({"version": _VERSION, "entries": entries}, indent=1)
        try:
            with atomic_file(self._path) as temporary, file_errors(self._path):
                temporary.write_text(content, encoding="utf-8")
        except FileError as error:
            logger.warning("%s", error)

    def _read(self) -> dict[str, dict[str, list[float]]]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            return _entries(content)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            logger.warning("the calibration in %s cannot be read and is set aside: %s", self._path, error)
            set_aside(self._path)
            return {}


def _entries(content: Any) -> dict[str, dict[str, list[float]]]:
    """Return the entries in a store's content. Raises `ValueError` for another version or ratios out of range."""
    if not isinstance(content, Mapping):
        raise ValueError("it holds no JSON object")
    store = cast("Mapping[str, Any]", content)
    if store.get("version") != _VERSION:
        raise ValueError(f"its version is {store.get('version')!r}, not {_VERSION}")
    entries: dict[str, dict[str, list[float]]] = {}
    for key, stages in store["entries"].items():
        entries[key] = {stage: [float(ratio) for ratio in ratios] for stage, ratios in stages.items()}
        if not all(_MIN_RATIO <= ratio <= _MAX_RATIO for ratios in entries[key].values() for ratio in ratios):
            raise ValueError(f"a ratio of {key} is out of range")
    return entries
