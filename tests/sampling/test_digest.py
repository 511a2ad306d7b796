"""Hashes of nested values: equal in any process for equal values, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest
import torch

from i2v_core.sampling.digest import digest


def test_it_is_the_same_in_any_process() -> None:
    """This one was got in another, where sets of strings are in another order."""
    value = {"b": [1, 2.5, None, "text"], ("block", 3): {"c", "a", "b"}, "a": torch.bfloat16, "t": torch.arange(6.0)}
    assert digest(value) == "d42384719260be1c212ecfb74e3240ca"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        ("1", 1),
        ([1, [2]], [[1], 2]),
        (["ab", "c"], ["a", "bc"]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        ([], {}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
        (torch.tensor(1.0), 1.0),
    ],
    ids=str,
)
def test_values_that_differ(one: object, other: object) -> None:
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1, 2), [1, 2]),
        (torch.ones(2, 3), torch.ones(3, 2).t()),
        (torch.ones(1), torch.ones(1).expand(1)),
        (uuid4(), uuid4()),
    ],
    ids=["dictionaries", "sequences", "strides", "expanded", "uuids"],
)
def test_values_that_are_the_same(one: object, other: object) -> None:
    assert digest(one) == digest(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64])
def test_any_precision(dtype: torch.dtype) -> None:
    assert digest(torch.zeros(3).to(dtype)) != digest(torch.ones(3).to(dtype))


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def patch(self, value: float) -> float:
        return value * self.scale


def scaling(scale: float) -> Callable[[float], float]:
    return lambda value: value * scale


@pytest.mark.parametrize(
    "make", [Scaled, scaling, lambda scale: Scaled(scale).patch], ids=["object", "closure", "method"]
)
def test_objects_count_by_name_or_by_what_they_hold(make: Callable[[float], object]) -> None:
    assert digest(make(1.0)) == digest(make(2.0))
    assert digest(make(1.0), object_levels=1) != digest(make(2.0), object_levels=1)
    assert digest(make(1.0), object_levels=1) == digest(make(1.0), object_levels=1)


def test_objects_that_hold_each_other() -> None:
    one, other = Scaled(1.0), Scaled(2.0)
    one.scale, other.scale = other, one  # pyright: ignore[reportAttributeAccessIssue]
    assert digest(one, object_levels=9)


def test_samples_tell_weights_apart() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    assert digest(weight, sampled=True) != digest(weight * 1.01, sampled=True)
    assert digest(weight, sampled=True) != digest(weight[:, :40], sampled=True)
    assert digest(weight.to("meta"), sampled=True) != digest(weight, sampled=True)
