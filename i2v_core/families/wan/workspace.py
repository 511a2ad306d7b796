"""Temporary memory that each layer call of a Wan transformer takes for one token of one branch, in bytes.

Counted are the tensors that `transformer.py` holds beside the hidden state, the keys and the values at the peak, with
RMS norms in PyTorch's composite form (CUDA's fused kernel takes less). `itemsize` is the bytes of one element.
"""

from __future__ import annotations

_FP32 = 4


def rms_norm(*, width: int, itemsize: int) -> int:
    """Return bytes of an RMS norm: two fp32 products, and for half precision an fp32 copy."""
    return width * _FP32 * (3 if itemsize < _FP32 else 2)


def layer_norm(*, width: int, itemsize: int) -> int:
    """Return bytes of a layer norm: the fp32 result, and for half precision an fp32 copy."""
    return width * _FP32 * (2 if itemsize < _FP32 else 1)


def rotation(*, width: int, itemsize: int) -> int:
    """Return bytes of a rotation: the rotated tensor, and three fp32 temporaries of half its width."""
    return width * (itemsize + 3 * _FP32 // 2)


def keys(*, width: int, itemsize: int) -> int:
    """Return bytes of computing keys and values: the tokens' norm, or the keys' norm or rotation."""
    return max(kind(width=width, itemsize=itemsize) for kind in (layer_norm, rms_norm, rotation))


def queries(*, width: int, itemsize: int) -> int:
    """Return bytes of computing queries: a query beside its norm. Rotation and attention to two contexts take less."""
    return width * itemsize + rms_norm(width=width, itemsize=itemsize)


def feed_forward(*, width: int, inner: int, itemsize: int) -> int:
    """Return bytes of the feed-forward: its norm; norm, inner projection and GELU; or the result, also in fp32."""
    after = width * (itemsize + (_FP32 if itemsize < _FP32 else 0))
    return max(layer_norm(width=width, itemsize=itemsize), (width + 2 * inner) * itemsize, after)


def out(*, width: int, patch: int, itemsize: int) -> int:
    """Return bytes of the output: the last norm, or its result and a patch of `patch` elements."""
    return max(layer_norm(width=width, itemsize=itemsize), (width + patch) * itemsize)


def embeddings(*, width: int, text_tokens: int, image_tokens: int, steps: int, itemsize: int) -> int:
    """Return bytes a branch of the embedded text, picture and `steps` time steps, results included.

    The peak is the text's two projections; the picture's norm beside the text; or both concatenated beside their parts.
    """
    norm = image_tokens * (itemsize + layer_norm(width=1, itemsize=itemsize))
    context = max(2 * text_tokens * itemsize, text_tokens * itemsize + norm)
    if image_tokens:
        context = max(context, 2 * (text_tokens + image_tokens) * itemsize)
    return width * (context + 7 * steps * itemsize)


def angles(*, tokens: int, head_width: int, itemsize: int) -> int:
    """Return bytes of the cosines and sines of the rotary embedding of all tokens."""
    return tokens * head_width * itemsize
