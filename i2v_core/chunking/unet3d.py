"""The I2VGen-XL denoiser's forward, layer by layer: the same graph as the model's own, without its idle tensors.

Where the model's own forward holds on to all skip connections, whole concatenations and whole upsampled tensors, this
walk gives each tensor up at its last use, and hands every layer to `frames` or `strips`, which cut it as the settings
say. Only the order of sums inside two-pass normalisations and the shapes given to kernels differ.

Legend: B batch, F frames, N batch × frames, C channels, H height, W width (latent).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import ends, frames, strips
from .ends import Conditions
from .execution import Execution, LayerRunner
from .settings import ChunkSettings
from .skips import Skips


class Walk:
    """One forward through the UNet. `hidden` (N, C, H, W) is the only reference to the hidden state between layers."""

    def __init__(self, execution: Execution, conditions: Conditions, hidden: torch.Tensor) -> None:
        self.hidden = hidden
        self._execution = execution
        self._conditions = conditions
        self._skips = Skips(park=execution.settings.park_skips)

    def start(self, transformer_in: Any) -> None:
        self._temporal_transformer(transformer_in)
        self._skips.push(self.hidden)

    def down(self, block: Any) -> None:
        for index, resnet in enumerate(block.resnets):
            self._resnet(resnet)
            self._after_resnet(block, index)
            self._skips.push(self.hidden)
        for downsampler in block.downsamplers or ():
            self.hidden = frames.downsample(self._execution, downsampler, self.hidden)
            self._skips.push(self.hidden)

    def middle(self, block: Any) -> None:
        self._resnet(block.resnets[0])
        self._temporal_conv(block.temp_convs[0])
        for index, resnet in enumerate(block.resnets[1:]):
            self._transformer(block.attentions[index])
            self._temporal_transformer(block.temp_attentions[index])
            self._resnet(resnet)
            self._temporal_conv(block.temp_convs[index + 1])

    def up(self, block: Any, upsampler: Any) -> None:
        """An up-block, with the upsampler of the block before it: that goes into the first layer's chunks."""
        for index, resnet in enumerate(block.resnets):
            self.hidden = frames.resnet(
                self._execution,
                resnet,
                self.hidden,
                self._conditions.embedding,
                skip=self._skips.pop(),
                upsampler=upsampler if index == 0 else None,
                in_place=not self._skips.hold(self.hidden),
            )
            self._after_resnet(block, index)

    def _after_resnet(self, block: Any, index: int) -> None:
        self._temporal_conv(block.temp_convs[index])
        if getattr(block, "has_cross_attention", False):
            self._transformer(block.attentions[index])
            self._temporal_transformer(block.temp_attentions[index])

    def _resnet(self, resnet: Any) -> None:
        in_place = not self._skips.hold(self.hidden)
        self.hidden = frames.resnet(self._execution, resnet, self.hidden, self._conditions.embedding, in_place=in_place)

    def _temporal_conv(self, layer: Any) -> None:
        self.hidden = strips.temporal_conv(self._execution, layer, self.hidden)

    def _transformer(self, model: Any) -> None:
        self.hidden = frames.transformer(
            self._execution, model, self.hidden, self._conditions.context, self._conditions.attention_kwargs
        )

    def _temporal_transformer(self, model: Any) -> None:
        self.hidden = strips.temporal_transformer(
            self._execution, model, self.hidden, self._conditions.attention_kwargs
        )


class ChunkedForward:
    """Stands in for `I2VGenXLUNet.forward`: the same arguments and result, without gradients."""

    def __init__(self, unet: Any, settings: ChunkSettings, on_chunk: Callable[[], None], runner: LayerRunner) -> None:
        self._unet = unet
        self._settings = settings
        self._on_chunk = on_chunk
        self._runner = runner

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

        execution = Execution(
            settings=self._settings,
            runner=self._runner,
            on_chunk=self._on_chunk,
            num_frames=sample.shape[2],
        )
        conditions = ends.conditions(
            self._unet,
            execution,
            timestep=timestep,
            timestep_cond=timestep_cond,
            fps=fps,
            first_latent_BCHW=image_latents[:, :, 0],
            image_embeddings=image_embeddings,
            text_BTC=encoder_hidden_states,
            attention_kwargs=cross_attention_kwargs or {},
        )
        prediction = _denoise(self._unet, execution, conditions, sample, image_latents)
        return UNet3DConditionOutput(sample=prediction) if return_dict else (prediction,)


def _denoise(
    unet: Any,
    execution: Execution,
    conditions: Conditions,
    sample_BCFHW: torch.Tensor,
    image_latents_BCFHW: torch.Tensor,
) -> torch.Tensor:
    """The prediction (B, C, F, H, W) for a noisy sample of the same shape."""
    walk = Walk(execution, conditions, ends.conv_in(unet, execution, sample_BCFHW, image_latents_BCFHW))
    walk.start(unet.transformer_in)
    for block in unet.down_blocks:
        walk.down(block)
    walk.middle(unet.mid_block)
    upsampler = None
    for block in unet.up_blocks:
        walk.up(block, upsampler)
        upsampler = block.upsamplers[0] if block.upsamplers else None
    return ends.out(unet, execution, walk.hidden)
