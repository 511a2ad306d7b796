"""A newer page than the host's own, for the tests of the page: `comfyui-frontend-package`, pinned, in its folder."""

from __future__ import annotations

import re
from pathlib import Path

from . import venv
from .console import Step
from .errors import SetupError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements-frontend.txt"
STATIC = Path("comfyui_frontend_package", "static")


def version() -> str:
    """The pinned version."""
    pinned = re.search(r"^comfyui-frontend-package==(\S+)", REQUIREMENTS.read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    return pinned[1]


def ensure(cache: Path, python: Path) -> Path:
    """The folder for the host's `--front-end-root`; where it is not there yet, `python`'s pip fetches it.

    Raises:
        SetupError: the package could not be fetched, or holds no page.
    """
    folder = cache / f"frontend-{version()}"
    if not folder.is_dir():
        step = Step("page")
        scratch = cache / f"{folder.name}.part"
        venv.install_apart(python, REQUIREMENTS, scratch, step)
        scratch.rename(folder)  # only a whole page ever has this name
        step.done(f"{version()} in {folder}")
    if not (folder / STATIC / "index.html").is_file():
        raise SetupError(f"{folder} holds no page. Delete it, and run this again.")
    return folder / STATIC
