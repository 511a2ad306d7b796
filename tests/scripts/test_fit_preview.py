"""The script that fits preview factors: what it writes is used, and it says how good they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fit_preview as script
import pytest
import torch
from PIL import Image

from i2v_core.families import load_model
from i2v_core.families.preview import FACTORS_FILE, preview_factors, read_factors


@pytest.fixture
def model_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(8):
        pixels = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).resize((90, 80)).save(folder / f"{seed}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_factors_are_fitted_judged_and_then_used(
    model_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_folder), "--pictures", str(pictures), "--size", "64"]
    assert script.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 images, PSNR in dB" in said
    content = json.loads((model_folder / FACTORS_FILE).read_text("utf-8"))
    assert content["pictures"] == 6
    # Of all factors, those fitted to a picture are the best for that picture.
    assert content["the_picture_itself_db_if_fitted_to_it"] >= content["the_picture_itself_db"] - 0.05
    factors = read_factors(model_folder / FACTORS_FILE, channels=4)
    assert factors is not None
    load_model(model_folder)
    assert torch.equal(preview_factors(model_folder, torch.rand(1, 4, 8, 8), Image.new("RGB", (64, 64))), factors)


def test_pictures_are_drawn_where_none_are_given_the_same_each_time() -> None:
    first, again = (next(script._draw(1)).tobytes() for _ in range(2))
    assert first == again
    assert len(set(first)) > 50


def test_too_few_pictures_are_refused(
    model_folder: Path, pictures: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for file in sorted(pictures.glob("*.png"))[2:]:
        file.unlink()
    out = tmp_path / "factors.json"
    assert script.main(["--model", str(model_folder), "--pictures", str(pictures), "--out", str(out)]) == 1
    assert "2 images are too few. Remedy: use 8 or more" in capsys.readouterr().err
    assert not out.exists()
