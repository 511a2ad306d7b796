"""Bytes of temporary memory that each layer call of a Wan transformer takes for one token of one branch.

Counted is what `wan.py` makes beside the hidden state, the keys and the values, at its worst line, with normalisations
by root mean square in PyTorch's composite form (CUDA's fused kernel takes less).

Legend: D width of a token, F width of the feed-forward, s bytes of a number.
"""

from __future__ import annotations

_FP32 = 4


def rms_norm(*, width: int, itemsize: int) -> int:
    """Two fp32 products, and of half precision an fp32 copy before them."""
    return width * _FP32 * (3 if itemsize < _FP32 else 2)


def layer_norm(*, width: int, itemsize: int) -> int:
    """The fp32 norm, and of half precision an fp32 copy before it."""
    return width * _FP32 * (2 if itemsize < _FP32 else 1)


def rotation(*, width: int, itemsize: int) -> int:
    """What is turned, and three fp32 products of every other number."""
    return width * (itemsize + 3 * _FP32 // 2)


def keys(*, width: int, itemsize: int) -> int:
    """Keys and values have their own memory; what is left is the tokens' norm, and the keys' norm and rotation."""
    return max(kind(width=width, itemsize=itemsize) for kind in (layer_norm, rms_norm, rotation))


def queries(*, width: int, itemsize: int) -> int:
    """A query beside its norm; rotation takes less, and so does attention to two contexts (3 s a number)."""
    return width * itemsize + rms_norm(width=width, itemsize=itemsize)


def feed_forward(*, width: int, inner: int, itemsize: int) -> int:
    """The norm; its result with the inner projection and GELU's; or what comes out, and that in fp32."""
    after = width * (itemsize + (_FP32 if itemsize < _FP32 else 0))
    return max(layer_norm(width=width, itemsize=itemsize), (width + 2 * inner) * itemsize, after)


def out(*, width: int, patch: int, itemsize: int) -> int:
    """The last norm, or its result and a patch of `patch` numbers."""
    return max(layer_norm(width=width, itemsize=itemsize), (width + patch) * itemsize)


def embeddings(*, width: int, text_tokens: int, image_tokens: int, steps: int, itemsize: int) -> int:
    """Bytes a branch of text, picture and `steps` time steps, embedded, these themselves included.

    The most of: the text's two projections; the picture's norm beside the text; both joined beside their parts.
    """
    norm = image_tokens * (itemsize + layer_norm(width=1, itemsize=itemsize))
    context = max(2 * text_tokens * itemsize, text_tokens * itemsize + norm)
    if image_tokens:
        context = max(context, 2 * (text_tokens + image_tokens) * itemsize)
    return width * (context + 7 * steps * itemsize)


def angles(*, tokens: int, head_width: int, itemsize: int) -> int:
    """Bytes of the cosines and sines by which all tokens' heads are turned."""
    return tokens * head_width * itemsize
