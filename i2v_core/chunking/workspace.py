"""Temporary memory that each kind of layer takes for one frame or one pixel, in bytes.

Counted are the tensors that are alive at once inside the layer's code. Not counted are its input, its output where that
is written in place or into one tensor for all chunks, vectors of one number a channel or row (some KiB), and memory
that a kernel takes for itself. The factors follow from that code line by line; a test measures each of them on the real
layers. `width` is the number of elements of one token, `itemsize` the bytes of one element.
"""

from __future__ import annotations

ATTENTION_FACTOR = 7
"""Widths that self-attention takes for one token: the token, its norm, query, key, value, the attention's output, and
the output projection (or, after it, the quotient by the rescale factor)."""

FEED_FORWARD_CHUNKS = 3
"""Chunks that the feed-forward runs in. It takes 17 widths a row beside the tokens: the norm, GEGLU's projection (8),
the gate's GELU (4) and the product (4). In three chunks it takes no more than attention: 1 + 17/3 < 7."""

PLAIN_TRANSFORMER_FACTOR = 20
"""Widths that diffusers' own transformer block takes for one token: at the product inside GEGLU the block's input, its
hidden state, the attention's output and the norm are alive (4) beside GEGLU's 16."""

PLAIN_TEMPORAL_CONV_FACTOR = 3
"""Widths that diffusers' own temporal convolution takes for one token: the stage's input, its norm, and SiLU's (or the
convolution's) output."""


def resnet(
    *, hidden: int, skip: int, out: int, pixels: int, upsamples: bool, shortcut: bool, offloaded: bool, itemsize: int
) -> int:
    """Return bytes a frame of a ResNet block, with the upsampling and the concatenation before it.

    `hidden`, `skip` and `out` are numbers of channels. Inside the block, of `joined` input channels, the peak is one
    of: norm and SiLU; SiLU and first convolution; the final sum and its quotient beside the second convolution and the
    shortcut's output.
    """
    upsampled = hidden if upsamples else 0
    joined = hidden + skip
    copied = joined if skip else upsampled
    inside = max(2 * joined, joined + out, (4 if shortcut else 3) * out)
    joining = upsampled + copied + (skip if offloaded else 0) if skip else 0
    return max(2 * upsampled, joining, copied + inside) * pixels * itemsize


def convolution(*, width: int, pixels_out: int, itemsize: int) -> int:
    """Return bytes a frame of a convolution, strided or not: its output."""
    return width * pixels_out * itemsize


def transformer(*, width: int, pixels: int, context_tokens: int, context_width: int, itemsize: int) -> int:
    """Return bytes a frame of a spatial transformer: self-attention, or cross-attention with the context's keys and
    values.

    Cross-attention holds the tokens, their norm, the query, the attention's output and the output projection.
    """
    self_attention = ATTENTION_FACTOR * pixels
    cross_attention = 5 * pixels + 2 * context_tokens
    return (width * max(self_attention, cross_attention) + context_tokens * context_width) * itemsize


def transformer_in_place(
    *, width: int, channels: int, pixels: int, context_tokens: int, context_width: int, itemsize: int
) -> int:
    """Return bytes a frame of a spatial block whose tokens are allocated outside of it.

    The peak is attention without the tokens, or making them: the norm of `channels`, its copy in the tokens' layout,
    and the projection.
    """
    self_attention = (ATTENTION_FACTOR - 1) * width * pixels
    cross_attention = width * (4 * pixels + 2 * context_tokens) + context_tokens * context_width
    making = (2 * channels + width) * pixels if channels else 0
    return max(self_attention, cross_attention, making) * itemsize


def temporal_block(
    *, width: int, frames: int, batch: int, context_tokens: int, context_width: int, itemsize: int
) -> int:
    """Return bytes a pixel, over all frames of the batch, of a temporal block: self-attention, or cross-attention.

    Cross-attention holds the tokens, their norm, the query, the attention's output and the output projection, and for
    each pixel the context, keys and values.
    """
    context = batch * context_tokens * (2 * width + context_width)
    return max(ATTENTION_FACTOR * width * frames, 5 * width * frames + context) * itemsize


def plain_transformer(*, width: int, pixels: int, context_tokens: int, context_width: int, itemsize: int) -> int:
    """Return bytes a frame of diffusers' own forward of a spatial transformer."""
    widths = max(PLAIN_TRANSFORMER_FACTOR * pixels, 7 * pixels + 2 * context_tokens)
    return (width * widths + context_tokens * context_width) * itemsize


def temporal_transformer(*, width: int, channels: int, frames: int, itemsize: int) -> int:
    """Return bytes a pixel, over all frames of the batch, of a temporal transformer: attention, or a projection."""
    return max(ATTENTION_FACTOR * width, width + channels) * frames * itemsize


def plain_temporal_transformer(*, width: int, channels: int, frames: int, itemsize: int) -> int:
    """Return bytes a pixel of diffusers' own forward: the feed-forward, or three tensors at the final residual sum."""
    return max(PLAIN_TRANSFORMER_FACTOR * width, 3 * channels) * frames * itemsize


def temporal_conv(*, channels: int, frames: int, itemsize: int) -> int:
    """Return bytes a pixel of one stage of a temporal convolution: its normalised input and its output."""
    return 2 * channels * frames * itemsize


def plain_temporal_conv(*, channels: int, frames: int, itemsize: int) -> int:
    """Return bytes a pixel of diffusers' own temporal convolution."""
    return PLAIN_TEMPORAL_CONV_FACTOR * channels * frames * itemsize


def group_statistics(*, channels: int, pixels: int, batch: int, itemsize: int) -> int:
    """Return bytes a frame, over the batch, of the statistics' fp32 copy (1 where the values are fp32 already)."""
    return batch * channels * pixels * 4 if itemsize < 4 else 1


def embeddings(
    *,
    batch: int,
    frames: int,
    width: int,
    conv_width: int,
    pixels: int,
    text_tokens: int,
    image_tokens: int,
    context_width: int,
    itemsize: int,
) -> int:
    """Return bytes of all embeddings, their results included.

    The time embedding for every frame is alive, and beside it either the convolutions of the first frame's latent, or
    the context and its parts. The first convolution's SiLU is pooled to 32 × 32 pixels whatever the latent's size; the
    second convolution makes a quarter of these, of twice the width.
    """
    pooled = 32 * 32
    convolving = conv_width * max(2 * pixels, pixels + pooled, pooled + 2 * pooled // 4)
    joining = (text_tokens + 2 * image_tokens) * context_width
    return (frames * width + batch * max(convolving, joining)) * itemsize


def repeated_embedding(*, batch: int, frames: int, width: int, itemsize: int) -> int:
    """Return bytes of an embedding, and of its copy for every frame."""
    return (batch + frames) * width * itemsize


def image_latents(*, channels: int, pixels: int, itemsize: int) -> int:
    """Return bytes a frame of the image latents' three convolutions: two tensors of four times the latent's width."""
    return 2 * 4 * channels * pixels * itemsize


def image_temporal(*, channels: int, frames: int, itemsize: int) -> int:
    """Return bytes a pixel of the image latents' temporal encoder.

    The peak is its input, norm, attention's output and their sum (4 widths), with the feed-forward's two inner tensors
    of four widths each. Its attention, of inner width two, holds less: input, norm, query, key, value, output and
    projection (2 + 4 × 2 + 1).
    """
    return (4 + 2 * 4) * channels * frames * itemsize


def conv_in(*, channels: int, out: int, pixels: int, itemsize: int) -> int:
    """Return bytes a frame of the first convolution: sample and image features concatenated, and the result."""
    return (channels + out) * pixels * itemsize


def out(*, width: int, out: int, pixels: int, itemsize: int) -> int:
    """Return bytes a frame of the last norm, SiLU and convolution, of which two results are alive at a time."""
    return max(2 * width, width + out) * pixels * itemsize
