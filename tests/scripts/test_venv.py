"""The project's environment: made, completed, repaired, and left alone when it is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_host import venv
from comfy_host.console import bar
from comfy_host.errors import SetupError
from comfy_host.process import ask


@pytest.mark.slow
def test_it_is_made_left_alone_and_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment, requirements = tmp_path / "env", tmp_path / "requirements.txt"
    requirements.write_text("# nothing\n", "utf-8")
    python = venv.ensure(environment, {"own": requirements})
    assert ask(python, "import sys; print(sys.prefix != sys.base_prefix)") == "True"
    assert set(json.loads((environment / venv.STAMP).read_text("utf-8"))) == {"own"}

    capsys.readouterr()
    assert venv.ensure(environment, {"own": requirements}) == python
    assert capsys.readouterr().out == "", "an environment that is right was touched"

    requirements.write_text("# changed\n", "utf-8")
    venv.ensure(environment, {"own": requirements})
    assert "packages" in capsys.readouterr().out

    leftover = environment / "leftover"
    for spoil in ((environment / venv.UNPACKING).touch, python.unlink):
        leftover.touch()
        spoil()
        venv.ensure(environment, {"own": requirements})
        assert not leftover.exists()
        assert ask(python, "import pip; print(1)") == "1"


@pytest.mark.slow
def test_a_failing_pip_says_why_and_leaves_no_stamp(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"-r {tmp_path / 'absent.txt'}\n", "utf-8")
    with pytest.raises(SetupError, match=r"absent\.txt"):
        venv.ensure(tmp_path / "env", {"own": requirements})
    assert not (tmp_path / "env" / venv.STAMP).exists()


@pytest.mark.parametrize(
    ("line", "before", "shown"),
    [
        ("Collecting torch==2.11.0 (from -r x)", "", "looking for torch"),
        ("Downloading https://a/b/torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl (530.6 MB)", "", "torch 2.11.0"),
        ("Using cached numpy-2.4.6-cp311-cp311-manylinux_2_27_x86_64.whl (16 MB)", "", "numpy 2.4.6"),
        ("Progress 50 of 100", "numpy 2.4.6", f"numpy 2.4.6  {bar(1, 2, 20)} 0.0 MiB"),
        (
            "Progress 2097152 of 2097152",
            f"numpy 2.4.6  {bar(1, 2, 20)} 0.0 MiB",
            f"numpy 2.4.6  {bar(1, 1, 20)} 2.0 MiB",
        ),
        ("Installing collected packages: a, b, c", "x", "unpacking 3 packages"),
        ("Requirement already satisfied: pip", "x", "x"),
    ],
)
def test_what_pip_prints_becomes_one_line(line: str, before: str, shown: str) -> None:
    assert venv._summary(line, before) == shown
