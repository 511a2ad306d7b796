"""Core's attention and feed-forward layers of LTX models, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from comfy.ldm.lightricks import model as core
from comfy.ldm.modules import attention
from torch import Tensor

from ..calls import CallState
from ..model import is_plain
from .guide_mask import is_guide_mask, rows_of_mask, runs_of
from .rotary import Rotary, rows_of, whole_table

Add: TypeAlias = Callable[[slice, Tensor], None]
"""Adds a layer's output (B, n, D) for some tokens to the hidden state."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence of which some tokens are made at a time."""

    make: Callable[[slice], Tensor]
    """Returns some tokens (B, n, D)."""
    like: Tensor
    """A tensor (B, L, D) of the same batch, length, width, precision and device."""
    rotary: Rotary | None = None

    @property
    def total(self) -> int:
        return self.like.shape[1]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token, over the whole batch."""
        batch, _, width = self.like.shape
        return batch * width * self.like.element_size()

    def whole(self) -> Tensor:
        """All tokens."""
        return self.make(slice(0, self.total))


@dataclass(frozen=True, slots=True)
class Source:
    """The sequence that a layer attends to, as the layer needs it."""

    rotary: Rotary | None
    keys: Tensor | None = None
    values: Tensor | None = None
    context: Tensor | None = None
    """The sequence itself, for a layer that another node has replaced."""


def source_of(state: CallState, layer: Any, tokens: Tokens) -> Source:
    """Keys and values of all tokens."""
    if not is_plain(layer, core.CrossAttention):
        return Source(tokens.rotary, context=tokens.whole())
    shape = (tokens.like.shape[0], tokens.total, layer.heads * layer.dim_head)
    keys, values = tokens.like.new_empty(shape), tokens.like.new_empty(shape)
    modules = (layer.to_k, layer.k_norm, layer.to_v)
    with state.tokens("keys", *modules, total=tokens.total, unit_bytes=_unit_bytes(layer, tokens)) as chunks:
        for chunk in chunks:
            given = tokens.make(chunk)
            values[:, chunk] = layer.to_v(given)
            keys[:, chunk] = _rotated(layer.k_norm(layer.to_k(given)), tokens.rotary, chunk)
            del given
    return Source(tokens.rotary, keys, values)


def attend(
    state: CallState,
    layer: Any,
    queries: Tokens,
    source: Source | None,
    add: Add,
    *,
    options: dict[str, Any],
    mask: Any = None,
) -> None:
    """One `CrossAttention` layer over its queries.

    Args:
        source: what they attend to; None: each other.
        options: core's transformer options.
        mask: one of core's, or a `GuideMask`.
    """
    if not is_plain(layer, core.CrossAttention):
        add(slice(0, queries.total), _run_whole(layer, queries, source, mask, options))
        return
    if source is None:
        source = source_of(state, layer, queries)
    modules = [layer.to_q, layer.q_norm, layer.to_out]
    if layer.to_gate_logits is not None:
        modules.append(layer.to_gate_logits)
    unit_bytes, runs = _unit_bytes(layer, queries), runs_of(mask, queries.total)
    with state.tokens("queries", *modules, total=queries.total, unit_bytes=unit_bytes, runs=runs) as chunks:
        for chunk in chunks:
            add(chunk, _attended(layer, queries, source, chunk, mask, options))


def _attended(layer: Any, queries: Tokens, source: Source, chunk: slice, mask: Any, options: dict[str, Any]) -> Tensor:
    """The layer's output for some of the queries."""
    given = queries.make(chunk)
    query = layer.q_norm(layer.to_q(given))
    gates = None if layer.to_gate_logits is None else 2.0 * torch.sigmoid(layer.to_gate_logits(given))
    del given
    query = _rotated(query, queries.rotary, chunk)
    out = _attention(layer, query, source, rows_of_mask(mask, chunk, queries.total), mask, options)
    del query
    if gates is not None:
        heads = out.view(*out.shape[:2], layer.heads, layer.dim_head) * gates.unsqueeze(-1)
        out = heads.view(out.shape)
        del heads
    return layer.to_out(out)


def _attention(
    layer: Any, query: Tensor, source: Source, rows: Tensor | None, mask: Any, options: dict[str, Any]
) -> Tensor:
    masked: dict[str, Any] = {} if rows is None else {"mask": rows}
    if rows is not None and is_guide_mask(mask):
        masked["low_precision_attention"] = False
    return attention.optimized_attention(
        query,
        source.keys,
        source.values,
        layer.heads,
        attn_precision=layer.attn_precision,
        transformer_options=options,
        **masked,
    )


def _run_whole(layer: Any, queries: Tokens, source: Source | None, mask: Any, options: dict[str, Any]) -> Tensor:
    """The call of a layer that another node has replaced, as core makes it."""
    given: dict[str, Any] = {"mask": mask, "transformer_options": options}
    if queries.rotary is not None:
        given["pe"] = whole_table(queries.rotary)
    if source is not None:
        given["context"] = source.context
        if source.rotary is not None:
            given["k_pe"] = whole_table(source.rotary)
    return layer(queries.whole(), **given)


def _rotated(inputs: Tensor, rotary: Rotary | None, chunk: slice) -> Tensor:
    return inputs if rotary is None else core.apply_rotary_emb(inputs, rows_of(rotary, chunk))


def _unit_bytes(layer: Any, tokens: Tokens) -> int:
    """Temporary bytes of a token, over the whole batch."""
    batch, _, width = tokens.like.shape
    inner = layer.heads * layer.dim_head
    numbers = 5 * width + (3 if tokens.rotary is None else 12) * inner
    return batch * numbers * tokens.like.element_size()


def feed_forward(state: CallState, layer: Any, tokens: Tokens, add: Add) -> None:
    """One `FeedForward` layer."""
    if not is_plain(layer, core.FeedForward):  # replaced by another node, which may treat tokens by their place
        add(slice(0, tokens.total), layer(tokens.whole()))
        return
    unit_bytes = 10 * tokens.token_bytes
    with state.tokens("feed_forward", layer, total=tokens.total, unit_bytes=unit_bytes) as chunks:
        for chunk in chunks:
            add(chunk, layer(tokens.make(chunk)))
