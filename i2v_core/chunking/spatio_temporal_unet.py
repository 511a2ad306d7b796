"""The forward of Stable Video Diffusion's denoiser, layer by layer: the same graph as the model's own.

Legend: B batch, F frames, N batch × frames, C channels, H height, W width (latent), T context tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import io_layers, spatial_layers, spatio_temporal, workspace
from .execution import ChunkedForwardBase, Execution, LayerRunner
from .inject import nothing, replace_forward
from .settings import ChunkSettings
from .unet_forward import UNetForward


@contextmanager
def chunked(
    unet: nn.Module,
    settings: ChunkSettings,
    *,
    on_chunk: Callable[[], None] = nothing,
    runner: LayerRunner | None = None,
) -> Generator[None]:
    """`inject.replace_forward` for a `UNetSpatioTemporalConditionModel`."""
    from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

    with replace_forward(unet, UNetSpatioTemporalConditionModel, ChunkedForward, settings, on_chunk, runner):
        yield


class ChunkedForward(ChunkedForwardBase):
    """Stands in for `UNetSpatioTemporalConditionModel.forward`: the same arguments and result, without gradients."""

    @torch.no_grad()
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        added_time_ids: torch.Tensor,
        return_dict: bool = True,
    ) -> Any:
        from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput

        unet = self._model
        execution = self._execution(num_frames=sample.shape[1])
        embedding = _embedding(unet, execution, sample, timestep, added_time_ids)
        hidden = spatial_layers.convolve(execution, "conv_in", unet.conv_in, sample.flatten(0, 1))
        walk = _Walk(execution, embedding, hidden, encoder_hidden_states)
        del hidden  # the walk gives it up
        walk.through(unet)
        prediction = io_layers.out(unet, execution, walk.hidden)
        return UNetSpatioTemporalConditionOutput(sample=prediction) if return_dict else (prediction,)


class _Walk(UNetForward):
    def __init__(
        self, execution: Execution, embedding: torch.Tensor, hidden: torch.Tensor, context_BTD: torch.Tensor
    ) -> None:
        super().__init__(execution, embedding, hidden)
        self._context_BTD = context_BTD

    def _resnet_of(self, block: Any, index: int) -> Any:
        return block.resnets[index].spatial_res_block

    def _along_time(self, block: Any, index: int) -> None:
        self.hidden = spatio_temporal.temporal_resnet(
            self._execution, block.resnets[index], self.hidden, self._embedding
        )

    def _attention(self, block: Any, index: int) -> None:
        self.hidden = spatio_temporal.transformer(
            self._execution, block.attentions[index], self.hidden, self._context_BTD
        )


def _embedding(
    unet: Any,
    execution: Execution,
    sample_BFCHW: torch.Tensor,
    timestep: torch.Tensor | float,
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """The step, and the frame rate, motion and noise of the picture (B, 3), for every frame: (N, width)."""
    batch, dtype = len(sample_BFCHW), sample_BFCHW.dtype
    unit_bytes = workspace.repeated_embedding(
        batch=batch,
        frames=batch * execution.num_frames,
        width=unet.time_embedding.linear_2.out_features,
        itemsize=sample_BFCHW.element_size(),
    )
    with execution.layer("embeddings", unet.time_embedding, unet.add_embedding, total=1, unit_bytes=unit_bytes):
        steps_B = torch.as_tensor(timestep, device=sample_BFCHW.device).reshape(-1).expand(batch)
        of_step = unet.time_embedding(unet.time_proj(steps_B).to(dtype))
        of_ids = unet.add_embedding(unet.add_time_proj(time_ids.flatten()).reshape(batch, -1).to(dtype))
        return (of_step + of_ids).repeat_interleave(execution.num_frames, dim=0)
