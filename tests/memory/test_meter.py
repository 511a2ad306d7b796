"""The storage meter: which tensors count, and that it keeps none alive."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from i2v_core.memory.meter import StorageMeter, fused_attention, host_memory, rounded_bytes

KIB = 1024


def kib_tensor(kib: int, device: str = "cpu") -> torch.Tensor:
    return torch.empty(kib * KIB // 4, device=device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_live_storages_and_keeps_the_peak(device: str) -> None:
    with StorageMeter() as meter:
        first = kib_tensor(4, device)
        second = kib_tensor(2, device)
        assert meter.current_bytes == 6 * KIB
        del first
        assert meter.current_bytes == 2 * KIB
        third = second + 1
        assert meter.current_bytes == 4 * KIB
        assert meter.peak_bytes == 6 * KIB
        meter.reset_peak()
        assert meter.peak_bytes == 4 * KIB
    del second, third
    assert meter.current_bytes == 0


def test_fake_tensors_are_counted() -> None:
    with FakeTensorMode(), StorageMeter() as meter:
        tensor = kib_tensor(4)
        product = tensor * 2
        assert meter.current_bytes == 8 * KIB
        del tensor, product
        assert meter.current_bytes == 0


def test_views_and_in_place_operations_are_free_and_hold_their_base() -> None:
    with StorageMeter() as meter:
        tensor = kib_tensor(4)
        view = tensor[10:].view(-1, 2).t()
        view.mul_(2).add_(1)
        assert meter.current_bytes == 4 * KIB
        del tensor
        assert meter.current_bytes == 4 * KIB
        del view
        assert meter.current_bytes == 0
    assert meter.peak_bytes == 4 * KIB


def test_rounds_to_the_allocators_blocks() -> None:
    assert [rounded_bytes(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    with StorageMeter() as meter:
        tensor = torch.empty(1)
    assert meter.current_bytes == 512
    del tensor


def test_tensors_from_outside_count_only_when_added() -> None:
    outside = kib_tensor(4)
    layer = nn.Linear(16, 16)
    with StorageMeter() as meter:
        view = outside.view(2, -1)
        assert meter.current_bytes == 0
        meter.add(outside, layer)
        meter.add(view, layer)
        assert meter.current_bytes == 4 * KIB + 16 * 16 * 4 + 512
    del outside, view
    assert meter.current_bytes == 16 * 16 * 4 + 512


def test_host_memory_and_other_devices_do_not_count() -> None:
    with StorageMeter(device_type="meta") as meter:
        tensors = [kib_tensor(4, "cpu"), kib_tensor(2, "meta")]
        with host_memory():
            tensors.append(kib_tensor(8, "meta"))
        tensors[2].add_(1)
        assert meter.current_bytes == 2 * KIB
    tensors.clear()
    assert meter.current_bytes == 0


def test_limit_raises_a_true_out_of_memory_error_and_recovers() -> None:
    with StorageMeter(limit_bytes=8 * KIB) as meter:
        tensor = kib_tensor(6)
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 6144 bytes") as caught:
            _ = tensor + 1
        assert meter.current_bytes == 6 * KIB
        del caught, tensor
        tensor = kib_tensor(8)
        assert meter.current_bytes == 8 * KIB
    del tensor


def test_the_failed_result_is_not_kept_alive_by_the_traceback() -> None:
    with StorageMeter(limit_bytes=4 * KIB) as small:
        with StorageMeter() as every, pytest.raises(torch.OutOfMemoryError) as caught:
            kib_tensor(8)
        assert every.current_bytes == small.current_bytes == 0
        assert caught.value.__traceback__ is not None


def test_tuple_results_and_lists_of_inputs_are_seen() -> None:
    with StorageMeter() as meter:
        parts = [kib_tensor(1), kib_tensor(1)]
        joined = torch.cat(parts)
        values, indices = joined.sort()
        assert meter.current_bytes == 2 * KIB + 2 * KIB + 2 * KIB + 4 * KIB
        split = values.chunk(2)
        assert meter.current_bytes == 10 * KIB
    del parts, joined, values, indices, split
    assert meter.current_bytes == 0


def test_holds_neither_tensors_nor_itself_alive() -> None:
    gc.disable()
    try:
        with StorageMeter() as meter:
            tensor = kib_tensor(4)
            tensor_ref = weakref.ref(tensor)
            del tensor
            assert tensor_ref() is None
        meter_ref = weakref.ref(meter)
        del meter
        assert meter_ref() is None
    finally:
        gc.enable()


def test_meters_nest() -> None:
    with StorageMeter() as outer:
        first = kib_tensor(2)
        with StorageMeter() as inner:
            second = kib_tensor(4)
        assert (outer.current_bytes, inner.current_bytes) == (6 * KIB, 4 * KIB)
    del first, second


def test_fused_attention_allocates_its_output_only() -> None:
    query = torch.empty(2, 4096, 4, 64, device="meta", dtype=torch.float16).transpose(1, 2)
    with StorageMeter() as meter, fused_attention():
        output = torch.nn.functional.scaled_dot_product_attention(query, query, query, dropout_p=0.0)
        assert output.shape == query.shape
        assert output.stride() == query.stride()
    output_bytes, row_bytes = output.numel() * 2, 2 * 4 * 4096 * 4
    assert meter.current_bytes == output_bytes
    assert meter.peak_bytes == output_bytes + row_bytes


def test_fused_attention_takes_the_values_width() -> None:
    query = torch.empty(1, 2, 8, 16, device="meta")
    value = torch.empty(1, 2, 8, 24, device="meta")
    with fused_attention():
        output = torch.nn.functional.scaled_dot_product_attention(query, query, value)
    assert output.shape == (1, 2, 8, 24)
