"""Amounts of memory, as people write them."""

from __future__ import annotations

import pytest

from i2v_core.errors import BadInputError
from i2v_core.units import GIB, KIB, MIB, format_gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("6", 6 * GIB),
        ("6GiB", 6 * GIB),
        (" 6 GB ", 6 * GIB),
        ("0.5g", GIB // 2),
        ("6144MiB", 6 * GIB),
        ("64 k", 64 * KIB),
        ("1000b", 1000),
        (".5", GIB // 2),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "0", "0GiB", "-2", "banana", "6 TiB", "nan", "inf", "1e999", "6GiB;", "٦x", "0.1b"]
)
def test_what_is_no_size_is_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(BadInputError, match="Remedy"):
        parse_bytes(text)


def test_sizes_read_well() -> None:
    assert format_gib(3.02 * GIB) == "3.02 GiB"
    assert format_gib(7 * MIB) == "7.0 MiB"
