"""Which host and which interpreter are used, and the scripts' own arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comfy_host import setup
from comfy_host.errors import SetupError


@pytest.fixture
def comfyui(tmp_path: Path) -> Path:
    """A folder that looks like a ComfyUI."""
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    return folder


def test_the_users_own_comfyui_is_used(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert setup.find(Path(sys.executable)) == setup.Host(folder=comfyui, python=Path(sys.executable))


def test_with_its_interpreter_nothing_is_installed(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setattr(setup, "ENVIRONMENT", comfyui / "absent")
    assert setup.prepare() == setup.Host(folder=comfyui, python=Path(sys.executable))
    assert not (comfyui / "absent").exists()


def test_an_interpreter_without_the_packages_is_refused(comfyui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = comfyui / "pack"
    pack.mkdir()
    (pack / "requirements.txt").write_text("# these\nPyYAML>=1\nno-such_package[extra]>=2\n", "utf-8")
    monkeypatch.setattr(setup, "PACK", pack)
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    with pytest.raises(SetupError, match=r"lacks no-such_package, which") as refusal:
        setup.prepare()
    assert f"pip install -r {pack / 'requirements.txt'}" in str(refusal.value)


def test_a_folder_that_is_no_comfyui_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(SetupError, match="is not a ComfyUI"):
        setup.prepare()


def test_an_interpreter_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    with pytest.raises(SetupError, match="set both"):
        setup.prepare()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "no/such/picture.png"], "does not exist"),
        (["--seed", "-1"], "whole number"),
        (["--seed", "ten"], "whole number"),
        (["--colour", "red"], "unrecognized"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_set_up(arguments: list[str], said: str, tmp_path: Path) -> None:
    # Were anything set up first, this would fail otherwise: there is no such host.
    environment = {"COMFYUI_PATH": str(tmp_path), "PYTHONPATH": ""}
    command = [sys.executable, str(setup.SCRIPTS / "demo.py"), *arguments]
    demo = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert demo.returncode == 2
    assert said in demo.stderr
