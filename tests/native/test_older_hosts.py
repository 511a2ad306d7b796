"""The tests of the native models in older versions of ComfyUI, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_host import setup, source

pytestmark = [pytest.mark.host, pytest.mark.slow]
TESTS = Path(__file__).parent
OLD_HOST_TESTS = ("test_equality.py", "test_fit.py", "test_resume.py", "test_wan.py", "vae/test_fitted_vae.py")


@pytest.mark.parametrize("version", source.OLDER_VERSIONS)
def test_native_models_in_an_older_host(version: str) -> None:
    folder = setup.CACHE / f"ComfyUI-{version}"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: scripts/test.py downloads it")
    arguments = ["-n", "0", "-q", "-p", "no:cacheprovider", *(str(TESTS / name) for name in OLD_HOST_TESTS)]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env={**os.environ, "COMFYUI_PATH": str(folder)},
        cwd=setup.PACK,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
