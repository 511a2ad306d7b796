"""Placing a module, and restoring it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from i2v_core.placement.placed import placed


def module() -> Any:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    net.tied = net.again = nn.Linear(4, 4)
    return net.requires_grad_(False)


@pytest.mark.parametrize("inference", [False, True])
def test_the_module_comes_back_bit_for_bit(inference: bool) -> None:
    with torch.inference_mode(inference):
        net = module()
        before = {name: (tensor, tensor.data_ptr(), tensor.clone()) for name, tensor in net.state_dict().items()}
        with placed(net, torch.device("cpu"), torch.bfloat16):
            assert {tensor.dtype for tensor in net.parameters()} == {torch.bfloat16}
            assert net[1].num_batches_tracked.dtype == torch.int64
            assert net.tied.weight is net.again.weight
        for name, tensor in net.state_dict().items():
            _, pointer, value = before[name]
            assert tensor.data_ptr() == pointer
            assert torch.equal(tensor, value)


def test_it_comes_back_from_an_error_too() -> None:
    net = module()
    with pytest.raises(RuntimeError, match="inside"), placed(net, torch.device("cpu"), torch.float16):
        raise RuntimeError("inside")
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}


def test_nothing_is_copied_where_nothing_changes() -> None:
    net = module()
    pointer = net[0].weight.data_ptr()
    with placed(net, torch.device("cpu"), torch.float32):
        assert net[0].weight.data_ptr() == pointer
