"""The model that jobs need, loaded once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ..families import I2VModel


class Models:
    """Loads models as jobs ask for them, from any thread; of those, the last is kept."""

    def __init__(self, load: Callable[[Path], I2VModel]) -> None:
        self._load = load
        self._turn = threading.Lock()
        self._last: tuple[Path, I2VModel] | None = None

    def model(self, folder: Path) -> I2VModel:
        """Raises `ModelFolderError` where there is none."""
        with self._turn:
            if self._last is None or self._last[0] != folder:
                self._last = None  # the former's memory first
                self._last = folder, self._load(folder)
            return self._last[1]
