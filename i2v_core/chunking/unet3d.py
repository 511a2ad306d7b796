"""Chunked forward of I2VGen-XL's UNet: the same graph as the model's own, without tensors that it no longer needs.

Only the order of sums inside two-pass normalisations and the shapes given to kernels differ (see `unet_forward`).

Legend: B batch, F frames, N batch × frames, C channels, H height, W width (latent).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import io_layers, spatial_layers, temporal_layers
from .execution import ChunkedForwardBase, Execution, LayerRunner
from .inject import nothing, replace_forward
from .io_layers import BlockInputs
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
    """Make an `I2VGenXLUNet` run chunked within the context; see `inject.replace_forward`.

    Raises:
        TypeError: the model is of another class.
        ValueError: it is in training mode, or uses FreeU, which needs concatenations of all frames.
    """
    from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet

    blocks: Any = getattr(unet, "up_blocks", ())
    if any(getattr(block, name, None) for block in blocks for name in ("s1", "s2", "b1", "b2")):
        raise ValueError("chunked execution does not support FreeU: call unet.disable_freeu() first")
    with replace_forward(unet, I2VGenXLUNet, ChunkedForward, settings, on_chunk, runner):
        yield


class _I2VGenForward(UNetForward):
    """The blocks of I2VGen-XL, whose spatial and temporal layers are separate modules."""

    def __init__(self, execution: Execution, block_inputs: BlockInputs, hidden: torch.Tensor) -> None:
        super().__init__(execution, block_inputs.embedding, hidden)
        self._inputs = block_inputs

    def start(self, transformer_in: Any) -> None:
        self._temporal_transformer(transformer_in)

    def _resnet_of(self, block: Any, index: int) -> Any:
        return block.resnets[index]

    def _temporal_layer(self, block: Any, index: int) -> None:
        self.hidden = temporal_layers.temporal_conv(self._execution, block.temp_convs[index], self.hidden)

    def _attention(self, block: Any, index: int) -> None:
        self.hidden = spatial_layers.transformer(
            self._execution,
            block.attentions[index],
            self.hidden,
            self._inputs.context,
            self._inputs.attention_kwargs,
        )
        self._temporal_transformer(block.temp_attentions[index])

    def _temporal_transformer(self, model: Any) -> None:
        self.hidden = temporal_layers.temporal_transformer(
            self._execution, model, self.hidden, self._inputs.attention_kwargs
        )


class ChunkedForward(ChunkedForwardBase):
    """Replaces `I2VGenXLUNet.forward`: the same arguments and result, without gradients."""

    @torch.no_grad()
    def __call__(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        fps: torch.Tensor,
        image_latents: torch.Tensor,
        image_embeddings: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput

        execution = self._execution(num_frames=sample.shape[2])
        block_inputs = io_layers.block_inputs(
            self._model,
            execution,
            timestep=timestep,
            timestep_cond=timestep_cond,
            fps=fps,
            first_latent_BCHW=image_latents[:, :, 0],
            image_embeddings=image_embeddings,
            text_BTC=encoder_hidden_states,
            attention_kwargs=cross_attention_kwargs or {},
        )
        prediction = _denoise(self._model, execution, block_inputs, sample, image_latents)
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)


def _denoise(
    unet: Any,
    execution: Execution,
    block_inputs: BlockInputs,
    sample_BCFHW: torch.Tensor,
    image_latents_BCFHW: torch.Tensor,
) -> torch.Tensor:
    """Return the prediction (B, C, F, H, W) for a noisy sample of the same shape."""
    forward = _I2VGenForward(
        execution, block_inputs, io_layers.conv_in(unet, execution, sample_BCFHW, image_latents_BCFHW)
    )
    forward.start(unet.transformer_in)
    forward.run_blocks(unet)
    return io_layers.out(unet, execution, forward.hidden).transpose(1, 2)
