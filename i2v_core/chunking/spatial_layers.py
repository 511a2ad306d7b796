"""Layers that process each frame by itself, run over chunks of frames.

Legend: N batch × frames, C channels, H height, W width (latent, at the layer's resolution), B batch, T context tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from . import workspace
from .execution import Execution
from .skips import Skip
from .transformer_block import apply_block


def resnet(
    execution: Execution,
    block: Any,
    hidden: torch.Tensor,
    embedding: torch.Tensor,
    *,
    skip: Skip | None = None,
    upsampler: Any = None,
    in_place: bool = False,
) -> torch.Tensor:
    """Run a `ResnetBlock2D`, after upsampling and concatenation with a skip connection where these are given.

    All three run a chunk of frames at a time, so the upsampled and the concatenated tensor never exist for all frames.
    The result (N, C, H, W) may overwrite `hidden` if `in_place`, and may always overwrite a skip on the device, which
    nothing else uses.
    """
    height, width = hidden.shape[-2:] if skip is None else skip.tensor.shape[-2:]
    result_shape = (len(hidden), block.out_channels, height, width)
    reusable = [hidden] if in_place else []
    if skip is not None and not skip.offloaded:
        reusable.append(skip.tensor)
    target = next((tensor for tensor in reusable if tensor.shape == result_shape), None)

    def run(frames: slice) -> torch.Tensor:
        chunk = hidden[frames]
        if upsampler is not None:
            chunk = upsampler(chunk, (height, width))
        if skip is not None:
            chunk = torch.cat([chunk, skip.chunk(frames, chunk.device)], dim=1)
        return block(chunk, embedding[frames])

    unit_bytes = workspace.resnet(
        hidden=hidden.shape[1],
        skip=0 if skip is None else skip.tensor.shape[1],
        out=block.out_channels,
        pixels=height * width,
        upsamples=upsampler is not None,
        shortcut=block.conv_shortcut is not None,
        offloaded=skip is not None and skip.offloaded,
        itemsize=hidden.element_size(),
    )
    modules = (block,) if upsampler is None else (upsampler, block)
    with execution.layer("resnet", *modules, unit="frame", total=len(hidden), unit_bytes=unit_bytes) as call:
        return execution.over_frames(call, run, hidden, result_shape[1:], target)


def downsample(execution: Execution, downsampler: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Run a `Downsample2D`, which halves height and width, rounded up."""
    height, width = hidden.shape[-2:]
    return convolve(execution, "downsample", downsampler, hidden, (-(-height // 2), -(-width // 2)))


def convolve(
    execution: Execution, kind: str, layer: Any, hidden: torch.Tensor, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """Run a convolution; `size` is the result's height and width where they differ from the input's."""
    height, width = size or (hidden.shape[-2], hidden.shape[-1])
    shape = (layer.out_channels, height, width)
    unit_bytes = workspace.convolution(
        width=layer.out_channels, pixels_out=height * width, itemsize=hidden.element_size()
    )
    with execution.layer(kind, layer, unit="frame", total=len(hidden), unit_bytes=unit_bytes) as call:
        return execution.over_frames(call, lambda frames: layer(hidden[frames]), hidden, shape)


def transformer(
    execution: Execution,
    model: Any,
    hidden: torch.Tensor,
    context: torch.Tensor,
    attention_kwargs: dict[str, Any],
) -> torch.Tensor:
    """Run a `Transformer2DModel`, in place if chunked; `context` (B, T, width) is repeated for one chunk at a time."""
    sizes = {
        "width": model.inner_dim,
        "pixels": hidden.shape[-2] * hidden.shape[-1],
        "context_tokens": context.shape[1],
        "context_width": context.shape[2],
        "itemsize": hidden.element_size(),
    }
    with execution.layer(
        "transformer",
        model,
        unit="frame",
        total=len(hidden),
        unit_bytes=workspace.transformer(**sizes),
        unchunked_bytes=workspace.plain_transformer(**sizes) * len(hidden),
    ) as call:
        if execution.runner.shape_only:
            return torch.empty_like(hidden) if call.unchunked else hidden
        batch_of_frame = torch.arange(len(hidden), device=hidden.device) // execution.num_frames
        if call.unchunked:
            return model(
                hidden,
                encoder_hidden_states=context[batch_of_frame],
                cross_attention_kwargs=attention_kwargs,
                return_dict=False,
            )[0]
        for frames in execution.chunks(call):
            chunk = hidden[frames]
            chunk.add_(_transform(model, chunk, context[batch_of_frame[frames]], attention_kwargs))
    return hidden


def _transform(
    model: Any, chunk: torch.Tensor, context: torch.Tensor, attention_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Return the residual (N, C, H, W) that a spatial transformer adds to its input."""
    count, _, height, width = chunk.shape
    tokens = _tokens(model, chunk)
    for block in model.transformer_blocks:
        apply_block(block, tokens, context, attention_kwargs)
    if model.use_linear_projection:
        tokens = model.proj_out(tokens)
    planes = tokens.transpose(1, 2).reshape(count, -1, height, width)
    return planes if model.use_linear_projection else model.proj_out(planes)


def _tokens(model: Any, chunk: torch.Tensor) -> torch.Tensor:
    """Return tokens (N, H·W, width) of normalised frames, projected before or after the change of layout."""
    planes = model.norm(chunk)
    if not model.use_linear_projection:
        planes = model.proj_in(planes)
    tokens = planes.flatten(2).transpose(1, 2).contiguous()
    return model.proj_in(tokens) if model.use_linear_projection else tokens
