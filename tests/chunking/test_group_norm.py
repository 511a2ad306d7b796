"""Two-pass group normalisation: exact for any chunks, and accurate where a naive sum of squares is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from i2v_core.chunking import ChunkSettings, LayerRunner
from i2v_core.chunking.execution import Execution
from i2v_core.chunking.group_norm import norm_over_frames


def normalised(values: torch.Tensor, norm: nn.GroupNorm, frames_per_chunk: int) -> torch.Tensor:
    """Normalise `values` (B, F, C, P) in a workspace that allows chunks of `frames_per_chunk` frames."""
    batch, frames, channels, pixels = values.shape
    frame_bytes = batch * channels * pixels * 4
    execution = Execution(
        settings=ChunkSettings(workspace_bytes=frames_per_chunk * frame_bytes),
        runner=LayerRunner(),
        on_chunk=lambda: None,
        num_frames=frames,
    )
    out = torch.empty_like(values)
    with torch.no_grad():
        norm_over_frames(execution, norm, values).apply(values, out)
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


@pytest.mark.parametrize("frames_per_chunk", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_group_norm_over_all_frames(norm: nn.GroupNorm, dtype: torch.dtype, frames_per_chunk: int) -> None:
    """Uses frames that differ so much that statistics of single chunks would be wrong."""
    level = torch.arange(7.0)[None, :, None, None]
    values = ((torch.randn(2, 7, 16, 30) + level) * (1 + level)).to(dtype)
    expected = reference(values, norm)
    result = normalised(values, norm, frames_per_chunk)
    error = (result.double() - expected).abs().max().item()
    assert error <= expected.abs().max().item() * max(torch.finfo(dtype).eps, 1e-6)


def test_a_mean_far_above_the_deviation_does_not_cancel(norm: nn.GroupNorm) -> None:
    """Uses a mean of 3000 deviations, where the mean of squares less the squared mean keeps no digit in fp32."""
    values = torch.randn(1, 5, 16, 200) + 3000
    naive = values.square().mean() - values.mean().square()
    assert abs(naive - 1) > 0.1
    error = (normalised(values, norm, frames_per_chunk=2).double() - reference(values, norm)).abs().max().item()
    assert error <= 2e-3  # 3000 itself is only known to 3000 × 2^-24 ≈ 2e-4 deviations
