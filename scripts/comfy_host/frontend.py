"""Gets a newer frontend than the host's own for the browser tests: the pinned `comfyui-frontend-package`."""

from __future__ import annotations

import re
from pathlib import Path

from . import venv
from .console import Step
from .errors import SetupError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-frontend.txt"
STATIC = Path("comfyui_frontend_package", "static")


def version() -> str:
    """Return the pinned version."""
    pinned = re.search(r"^comfyui-frontend-package==(\S+)", REQUIREMENTS.read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    return pinned[1]


def ensure(cache: Path, python: Path) -> Path:
    """Return the folder for the host's `--front-end-root`; download it with `python`'s pip if it is missing.

    Raises:
        SetupError: the package could not be downloaded, or holds no page.
    """
    folder = cache / f"frontend-{version()}"
    if not folder.is_dir():
        step = Step("page")
        scratch = cache / f"{folder.name}.part"
        venv.install_apart(python, REQUIREMENTS, scratch, step)
        scratch.rename(folder)  # renamed last, so that this name means a complete download
        step.done(f"{version()} in {folder}")
    if not (folder / STATIC / "index.html").is_file():
        raise SetupError(f"{folder} holds no page. Delete it and run this again.")
    return folder / STATIC
