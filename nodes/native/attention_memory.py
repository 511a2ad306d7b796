"""Memory that core's attention functions take, modelled on the meta device: the copies that each makes around its
kernel, and what the kernel allocates.

Read in November 2026: core's `comfy/ldm/modules/attention.py` and `sub_quadratic_attention.py` (0.18.2 to 0.30.0),
PyTorch's `transformers/attention.cpp` and `cuda/attention.cu` (2.11), SageAttention's `core.py` and `quant.py` (2.2),
SageAttention3's `api.py`.

Shape legend: B batch, H heads, L queries, S keys, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Allocates as a kernel does, of query (B, H, L, D), key and value (B, H, S, D) and a mask; returns its output."""

_AS_THEY_ARE = ("attention_pytorch", "attention_basic", "attention_flash")
"""Functions of core's that run on the meta device: their copies are counted as they make them."""
TAKING_WHAT_IS_FREE = ("attention_sub_quad", "attention_split")
"""Functions of core's that take more where more is free: the least that they need is predicted."""


def attention_output(
    function: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Core's `optimized_attention_override` that allocates as `function` would; its output is undefined."""
    if function.__name__ in _AS_THEY_ARE:
        return function(
            q,
            k,
            v,
            heads,
            mask=mask,
            attn_precision=attn_precision,
            skip_reshape=skip_reshape,
            skip_output_reshape=skip_output_reshape,
            **kwargs,
        )
    if not skip_reshape:
        width = q.shape[-1] // heads
        q, k, v = (it.reshape(it.shape[0], it.shape[1], -1, width).transpose(1, 2) for it in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (it.repeat_interleave(q.shape[1] // it.shape[1], dim=1) for it in (k, v))
    kernel = _KERNELS.get(function.__name__, _sage_by_heads if skip_reshape else _sage)
    if not kwargs.get("low_precision_attention", True):
        kernel = _fused
    output = kernel(q, k, v, mask)
    return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def replaced_attention_output(_function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Allocates at least what an attention takes that another node has put in, as far as nodes do that: Sage's."""
    return attention_output(_attention_of_another_node, *args, **kwargs)


def sdpa(
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """Allocates as PyTorch's scaled dot-product attention does on `device`."""
    if not _has_kernel(device, query.dtype, query.shape[-1], attn_mask is not None):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, *args, **kwargs
        )  # meta takes it apart alike
    return _fused(query, key, value, attn_mask)


@lru_cache(maxsize=64)
def _has_kernel(device: torch.device, dtype: torch.dtype, width: int, masked: bool) -> bool:
    """Whether PyTorch has a fused kernel for such inputs; other devices than CUDA are taken to have one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return True
    query = torch.empty(1, 1, 16, width, dtype=dtype, device=device)
    mask = query.new_empty(1, 1, 16, 16) if masked else None
    backends = torch.backends.cuda
    parameters = backends.SDPAParams(query, query, query, mask, 0.0, False, False)
    tests = (backends.can_use_flash_attention, backends.can_use_cudnn_attention, backends.can_use_efficient_attention)
    return any(test(parameters) for test in tests)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """A kernel that works through keys in tiles: the output, and a log-sum-exp for each query."""
    held = [q.new_empty(q.shape[:-1], dtype=torch.float32)]
    padding = -q.shape[-1] % 8
    if padding:  # FlashAttention takes widths of a multiple of 8
        q, k, v = (F.pad(it, (0, padding)) for it in (q, k, v))
    if mask is not None:
        # A mask of booleans becomes one of numbers, by way of its inverse, and each may be copied to align its rows.
        copies = 2 if mask.dtype == torch.bool else 1
        held.append(q.new_empty(copies * mask.numel() + mask.numel() // q.element_size()))
    output = torch.empty_like(q)  # in the query's layout
    return output[..., : output.shape[-1] - padding] if padding else output


def _sage(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SageAttention 2: query and key in 8 bits, and copies of the value; the output by tokens, as core hands the query
    over.
    """
    if mask is not None or q.shape[-1] > 128 or q.dtype == torch.float32:
        return _fused(q, k, v, mask)
    width = 64 if q.shape[-1] <= 64 else 128
    held = [F.pad(it, (0, width - it.shape[-1])) for it in (q, k, v)] if width != q.shape[-1] else []
    batch, heads, queries, _ = q.shape
    key_numbers = k.numel() // k.shape[-1] * width
    held.append(_bytes_like(q, batch * heads * queries * width + key_numbers))
    output = q.new_empty(batch, queries, heads, width)
    held.append(_bytes_like(q, key_numbers * _sage_value_bytes()))
    return output.transpose(1, 2)[..., : q.shape[-1]]


def _sage_by_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return _sage(q, k, v, mask).contiguous()


@cache
def _sage_value_bytes() -> int:
    """Bytes for each number of the value: transposed and in 8 bits, on 9.0 padded before; or in fp16 on older cards,
    whose Triton kernels hold a copy of the key meanwhile where it is smoothed (core's default before 0.30).
    """
    by_capability = {(8, 0): 4, (8, 6): 4, (8, 7): 4, (8, 9): 3, (12, 0): 3, (12, 1): 3}
    return by_capability.get(torch.cuda.get_device_capability(), 5) if torch.cuda.is_available() else 5


def _sage3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SageAttention 3: padded and smoothed copies, the scores of each group of 128 queries in fp32, all in 4 bits."""
    if mask is not None or q.shape[-1] >= 256 or q.shape[2] <= 1024:
        return _fused(q, k, v, mask)
    q, k, v = (it.contiguous() for it in (q, k, v))
    queries, keys = (-(-it.shape[2] // 128) * 128 for it in (q, k))
    batch, heads, _, width = q.shape
    held = [q.new_empty(batch, heads, queries, width) for _ in range(2)]
    held += [q.new_empty(batch, heads, keys, width) for _ in range(3)]
    group_scores = batch * heads * (queries // 128) * keys
    product = q.new_empty(group_scores)
    held.append(q.new_empty(group_scores, dtype=torch.float32))
    del product
    held.append(_bytes_like(q, batch * heads * width * (queries + 2 * keys) * 9 // 16))
    return q.new_empty(batch, heads, queries, width)[:, :, : q.shape[2]]


def _xformers(q: Tensor, _k: Tensor, _v: Tensor, mask: Tensor | None) -> Tensor:
    held = [q.new_empty(q.shape[:-1], dtype=torch.float32)]
    if mask is not None:
        held.append(q.new_empty(mask.numel() // mask.shape[-1] * (mask.shape[-1] + 8)))
    batch, heads, queries, width = q.shape
    return q.new_empty(batch, queries, heads, width).transpose(1, 2)


def _sub_quadratic(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The least that it takes, where little is free: 512 queries at a time, and for each of them the part results of
    √S keys at a time. Where more is free it takes more, up to about half of that.
    """
    batch_heads, queries, width = q.shape[0] * q.shape[1], q.shape[2], q.shape[3]
    held = [it.reshape(batch_heads, -1, width) for it in (q, v)]
    held.append(k.transpose(2, 3).reshape(batch_heads, width, -1))
    held += _mask_by_heads(mask, batch_heads)
    at_once, chunks = min(512, queries), -(-k.shape[2] // max(1, math.isqrt(k.shape[2])))
    # Part results as a list and stacked, with their sums and maxima, and one more of all keys.
    parts = q.new_empty(batch_heads * at_once * (chunks * (2 * width + 5) + width + 4))
    outputs = q.new_empty(batch_heads, queries, width)
    del parts
    return torch.empty_like(outputs).reshape(q.shape)  # joined of the parts


def _split(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The least that it takes, in 64 steps: two forms of the scores of a step; all at once where 64 does not divide."""
    batch_heads, queries, width = q.shape[0] * q.shape[1], q.shape[2], q.shape[3]
    held = [it.reshape(batch_heads, -1, width).contiguous() for it in (q, k, v)]
    held += _mask_by_heads(mask, batch_heads)
    output = torch.empty_like(held[0])
    at_once = queries if queries % 64 else queries // 64
    held.append(q.new_empty(2, batch_heads, at_once, k.shape[2]))
    return output.reshape(q.shape)


def _mask_by_heads(mask: Tensor | None, batch_heads: int) -> list[Tensor]:
    """The mask once for each head."""
    return [] if mask is None else [mask.new_empty(batch_heads, *mask.shape[-2:])]


def _attention_of_another_node() -> Tensor:
    raise AssertionError("only its name is used")


def _bytes_like(like: Tensor, count: int) -> Tensor:
    return like.new_empty(count, dtype=torch.uint8)


_KERNELS: dict[str, Kernel] = {
    "attention3_sage": _sage3,
    "attention_xformers": _xformers,
    "attention_sub_quad": _sub_quadratic,
    "attention_split": _split,
}
