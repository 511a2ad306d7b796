"""The host's archive: only the pinned one, only the wanted folder, and nothing outside of it."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path, PurePosixPath

import pytest
from comfy_host.errors import SetupError
from comfy_host.source import unpack

INSIDE = PurePosixPath("pack-1.0", "vendor", "host")


def archive(folder: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> tuple[Path, str]:
    path = folder / "pack.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_the_wanted_folder_is_unpacked(tmp_path: Path) -> None:
    path, sha256 = archive(
        tmp_path,
        {
            "pack-1.0/vendor/host/main.py": b"run",
            "pack-1.0/vendor/host/comfy/ops.py": b"ops",
            "pack-1.0/setup.py": b"no",
        },
        links={"pack-1.0/vendor/host/link.py": "/etc/passwd"},
    )
    unpack(path, sha256, INSIDE, tmp_path / "host")
    found = {
        file.relative_to(tmp_path / "host").as_posix() for file in (tmp_path / "host").rglob("*") if file.is_file()
    }
    assert found == {"main.py", "comfy/ops.py"}
    assert (tmp_path / "host" / "main.py").read_bytes() == b"run"


def test_another_archive_is_refused(tmp_path: Path) -> None:
    path, _ = archive(tmp_path, {"pack-1.0/vendor/host/main.py": b"run"})
    with pytest.raises(SetupError, match="expected"):
        unpack(path, "0" * 64, INSIDE, tmp_path / "host")
    assert not (tmp_path / "host").exists()


def test_a_name_that_leads_out_is_refused(tmp_path: Path) -> None:
    path, sha256 = archive(tmp_path, {"pack-1.0/vendor/host/../../../../out.py": b"bad"})
    with pytest.raises(SetupError, match="leads out"):
        unpack(path, sha256, INSIDE, tmp_path / "deep" / "host")
    assert not list(tmp_path.rglob("out.py"))


def test_an_archive_without_the_folder_is_refused(tmp_path: Path) -> None:
    path, sha256 = archive(tmp_path, {"pack-1.0/setup.py": b"no"})
    with pytest.raises(SetupError, match="does not contain"):
        unpack(path, sha256, INSIDE, tmp_path / "host")
