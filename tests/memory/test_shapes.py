"""The cache of operations on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from i2v_core.memory.meter import StorageMeter
from i2v_core.memory.shapes import KnownShapes

META = torch.device("meta")


def meta(*sizes: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device=META)


def layers(hidden: Tensor) -> Tensor:
    """Run copies, views, in-place operations and operations with several results, with repeated shapes."""
    for _ in range(3):
        normed = functional.group_norm(hidden, 4)
        last = functional.pad(normed, (1, 1)).transpose(2, 3)[..., :8].contiguous()
        normed = functional.linear(last, meta(8, 8)).add_(1)
        hidden = normed[:, :, :8] + functional.normalize(last, dim=1)[:, :, :8]
        del normed, last
    mean, variance = torch.var_mean(hidden.float(), dim=1)
    return hidden + (mean * variance).half()[:, None]


def measured(run: Callable[[Tensor], Tensor], *, known: bool) -> tuple[Tensor, int, list[int]]:
    """Return the result, the peak, and the bytes in use over time."""
    changes: list[int] = []
    meter = StorageMeter(device_type="meta", on_change=changes.append)
    if known:
        meter = StorageMeter(device_type="meta", on_change=changes.append, run=KnownShapes())
    hidden = meta(2, 8, 8, 8)
    with torch.no_grad(), meter:
        return run(hidden), meter.peak_bytes, changes


def test_code_takes_the_same_memory_at_any_time() -> None:
    plain, plain_peak_bytes, plain_changes = measured(layers, known=False)
    known, peak_bytes, changes = measured(layers, known=True)
    assert (peak_bytes, changes) == (plain_peak_bytes, plain_changes)
    assert (known.shape, known.stride(), known.dtype) == (plain.shape, plain.stride(), plain.dtype)


def test_cached_operations_do_not_run_again() -> None:
    runs: list[object] = []

    def counted(func: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> object:
            runs.append(func)
            return func(*args, **kwargs)

        run._schema = func._schema  # type: ignore[attr-defined]
        return run

    shapes, add = KnownShapes(), counted(torch.ops.aten.add.Tensor)
    first, second = (shapes(add, (meta(3), meta(3)), {}) for _ in range(2))
    assert len(runs) == 1
    assert first.shape == second.shape == (3,)
    assert first.untyped_storage()._cdata != second.untyped_storage()._cdata
    shapes(add, (meta(4), meta(4)), {})
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("first", "second", "dtype"), [(2, 2.0, torch.float32), (1, True, torch.int64), (2.0, 2, torch.int64)]
)
def test_equal_numbers_of_different_types_are_different(first: float, second: float, dtype: torch.dtype) -> None:
    shapes, multiply = KnownShapes(), torch.ops.aten.mul.Scalar
    numbers = meta(3, dtype=torch.int64)
    shapes(multiply, (numbers, first), {})
    assert shapes(multiply, (numbers, second), {}).dtype is dtype


def test_a_view_that_is_called_new_stays_a_view() -> None:
    shapes, tensor = KnownShapes(), meta(4, 4)
    for _ in range(2):
        view = shapes(torch.ops.aten._unsafe_view.default, (tensor, [16]), {})
        assert view.untyped_storage()._cdata == tensor.untyped_storage()._cdata


def test_values_on_other_devices_are_computed() -> None:
    shapes, add = KnownShapes(), torch.ops.aten.add.Tensor
    for number in (1.0, 2.0):
        assert shapes(add, (torch.tensor(number), torch.tensor(1.0)), {}).item() == number + 1
    made = [shapes(torch.ops.aten.arange.default, (end,), {"device": torch.device("cpu")}) for end in (3, 3)]
    assert all(torch.equal(it, torch.arange(3)) for it in made)


def test_operations_without_a_result_run() -> None:
    shapes, tensor = KnownShapes(), torch.tensor(True)
    for _ in range(2):
        assert shapes(torch.ops.aten._assert_async.default, (tensor,), {}) is None
