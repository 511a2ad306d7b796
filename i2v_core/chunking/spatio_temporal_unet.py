"""Chunked forward of Stable Video Diffusion's UNet: the same graph as the model's own, layer by layer.

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
    """Make a `UNetSpatioTemporalConditionModel` run chunked within the context; see `inject.replace_forward`."""
    from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel

    with replace_forward(unet, UNetSpatioTemporalConditionModel, ChunkedForward, settings, on_chunk, runner):
        yield


class ChunkedForward(ChunkedForwardBase):
    """Replaces `UNetSpatioTemporalConditionModel.forward`: the same arguments and result, without gradients."""

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
        forward = _SVDForward(execution, embedding, hidden, encoder_hidden_states)
        del hidden  # so that `forward` holds the only reference, and can free it
        forward.run_blocks(unet)
        prediction = io_layers.out(unet, execution, forward.hidden)
        return UNetSpatioTemporalConditionOutput(sample=prediction) if return_dict else (prediction,)


class _SVDForward(UNetForward):
    """The blocks of Stable Video Diffusion, whose layers pair a spatial part with a temporal one."""

    def __init__(
        self, execution: Execution, embedding: torch.Tensor, hidden: torch.Tensor, context_BTD: torch.Tensor
    ) -> None:
        super().__init__(execution, embedding, hidden)
        self._context_BTD = context_BTD

    def _resnet_of(self, block: Any, index: int) -> Any:
        return block.resnets[index].spatial_res_block

    def _temporal_layer(self, block: Any, index: int) -> None:
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
    """Return the embedding (N, width) of the time step and of frame rate, motion and noise (B, 3), for every frame."""
    batch, dtype = len(sample_BFCHW), sample_BFCHW.dtype
    unit_bytes = workspace.repeated_embedding(
        batch=batch,
        frames=batch * execution.num_frames,
        width=unet.time_embedding.linear_2.out_features,
        itemsize=sample_BFCHW.element_size(),
    )
    with execution.layer("embeddings", unet.time_embedding, unet.add_embedding, total=1, unit_bytes=unit_bytes):
        steps_B = torch.as_tensor(timestep, device=sample_BFCHW.device).reshape(-1).expand(batch)
        step = unet.time_embedding(unet.time_proj(steps_B).to(dtype))
        ids = unet.add_embedding(unet.add_time_proj(time_ids.flatten()).reshape(batch, -1).to(dtype))
        return (step + ids).repeat_interleave(execution.num_frames, dim=0)
