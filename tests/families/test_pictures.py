"""Fitting pictures to sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from i2v_core.errors import BadInputError
from i2v_core.families.pictures import cover, first_picture

SIDES = st.integers(1, 200)


@given(SIDES, SIDES, SIDES, SIDES)
def test_a_white_picture_stays_white_at_any_size(
    width: int, height: int, wanted_width: int, wanted_height: int
) -> None:
    fitted = cover(Image.new("RGB", (width, height), "white"), wanted_width, wanted_height)
    assert fitted.size == (wanted_width, wanted_height)
    assert fitted.getextrema() == ((255, 255),) * 3


def test_the_middle_is_kept() -> None:
    picture = Image.new("RGB", (300, 100), "black")
    picture.paste("white", (100, 0, 200, 100))
    assert cover(picture, 50, 50).getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_a_narrow_picture_is_refused_and_not_scaled_up(size: tuple[int, int]) -> None:
    with pytest.raises(BadInputError, match=f"{size[0]}×{size[1]} pixels"):
        cover(Image.new("RGB", size), 8192, 8192)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_colour_and_transparent_pictures_are_read(channels: int) -> None:
    assert first_picture(torch.full((2, 6, 8, channels), 0.5)).getpixel((3, 3)) == (128, 128, 128)


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (8, 8, 3), (1, 8, 8, 2)])
def test_tensors_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInputError, match="shape"):
        first_picture(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    image = torch.zeros(1, 8, 8, 3)
    image[0, 2, 3, 1] = value
    with pytest.raises(BadInputError, match="NaN or infinite"):
        first_picture(image)
