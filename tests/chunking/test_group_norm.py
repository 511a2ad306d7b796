"""Two-pass group normalisation: exact over any cut, and numerically sound where a naive sum of squares is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from i2v_core.chunking import ChunkSettings, LayerRunner
from i2v_core.chunking.execution import Execution
from i2v_core.chunking.group_norm import over_all_frames


def normalised(values: torch.Tensor, norm: nn.GroupNorm, frames_per_piece: int) -> torch.Tensor:
    """`values` are (B, F, C, P); a piece is made of so many frames by the workspace it is given."""
    batch, frames, channels, pixels = values.shape
    frame_bytes = batch * channels * pixels * 4
    execution = Execution(
        settings=ChunkSettings(workspace_bytes=frames_per_piece * frame_bytes),
        runner=LayerRunner(),
        on_chunk=lambda: None,
        num_frames=frames,
    )
    out = torch.empty_like(values)
    with torch.no_grad():
        over_all_frames(execution, norm, values).apply(values, out)
    return out


@pytest.fixture
def norm() -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def reference(values: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    with torch.no_grad():
        double = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps).double()
        double.load_state_dict(norm.state_dict())
        return double(values.double().transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("frames_per_piece", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_group_norm_over_all_frames(norm: nn.GroupNorm, dtype: torch.dtype, frames_per_piece: int) -> None:
    """Frames differ much, so statistics of pieces alone would be wrong. Rounding to `dtype` happens once."""
    level = torch.arange(7.0)[None, :, None, None]
    values = ((torch.randn(2, 7, 16, 30) + level) * (1 + level)).to(dtype)
    expected = reference(values, norm)
    result = normalised(values, norm, frames_per_piece)
    error = (result.double() - expected).abs().max().item()
    assert error <= expected.abs().max().item() * max(torch.finfo(dtype).eps, 1e-6)


def test_a_mean_far_above_the_deviation_does_not_cancel(norm: nn.GroupNorm) -> None:
    """In fp32 the mean of squares less the square of the mean keeps no digit here: the mean is 3000 deviations."""
    values = torch.randn(1, 5, 16, 200) + 3000
    naive = values.square().mean() - values.mean().square()
    assert abs(naive - 1) > 0.1
    error = (normalised(values, norm, frames_per_piece=2).double() - reference(values, norm)).abs().max().item()
    assert error <= 2e-3  # 3000 itself is only known to 3000 × 2^-24 ≈ 2e-4 deviations
