"""A Wan of each layout in a real host: from a picture to frames, with the host's own nodes around."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
from comfy_host.client import Client, ExecutionError
from comfy_host.server import Server

SIZE = {"width": 96, "height": 64, "frames": 9}


@pytest.fixture(scope="module")
def wan(server: Server, wan_folder: Path) -> str:
    """The model's name in the loader."""
    target = server.models_folder / "diffusers" / wan_folder.name
    if not target.exists():
        shutil.copytree(wan_folder, target)
    return wan_folder.name


def test_a_picture_and_a_prompt_become_frames(client: Client, server: Server, make_prompt: Any, wan: str) -> None:
    changes = {"loader": {"model": wan}, "budget": SIZE, "sampler": {"scheduler": "auto"}}
    run = client.run(make_prompt(**changes, save={"filename_prefix": wan.replace(".", "_")}))
    frames = [
        iio.imread(server.output_folder / file["filename"]).astype(float) for file in run.outputs["save"]["images"]
    ]
    assert [frame.shape for frame in frames] == [(64, 96, 3)] * 9
    assert np.std(frames[0]) > 0
    plan = run.outputs["budget"]["i2v_plan"][0]
    assert (plan["width"], plan["height"], plan["frames"]) == (96, 64, 9)


def test_other_numbers_of_frames_are_refused_with_the_nearest(client: Client, make_prompt: Any, wan: str) -> None:
    prompt = make_prompt(loader={"model": wan}, budget={**SIZE, "frames": 10}, sampler={"scheduler": "auto"})
    with pytest.raises(ExecutionError, match="use 9 or 13"):
        client.run(prompt)
