"""Chunked forward of the Wan transformer: the model's own result, without tensors that it no longer needs.

Every layer but self-attention processes tokens one by one, and self-attention needs only the keys and values of other
tokens. So keys and values are computed for all tokens, and everything else runs on a chunk of tokens at a time and
updates the hidden state in place: a block takes the hidden state, keys and values, and a workspace. Only the shapes
given to kernels differ from diffusers' own forward. A time step given for each token is embedded once for each run of
equal ones.

Legend: B batch, S tokens of the video, n tokens of a chunk, L tokens of the context, R runs of tokens that share a time
step, D width of a token, H heads, d width of a head, C channels, T/H/W latent frames, height and width, P elements of
a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...chunking.execution import ChunkableWork, ChunkedForwardBase, Execution, LayerKind, LayerRunner
from ...chunking.inject import nothing, replace_forward
from ...chunking.settings import ChunkSettings
from . import workspace
from .io_layers import WanBlockInputs, block_inputs, embed_patches, own_weights, unpatch

_TEXT_TOKENS = 512
"""Tokens of text at the end of a context that begins with a picture: a constant of the model's own code."""

_FEWEST_TOKENS = 64
"""Smallest chunk: fewer tokens at a time would leave a GPU idle."""


class ChunkedWanForward(ChunkedForwardBase):
    """Replaces `WanTransformer3DModel.forward`: the same arguments and result, without gradients."""

    @torch.no_grad()
    def __call__(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if attention_kwargs:
            raise ValueError(f"chunked execution takes no attention_kwargs, got {sorted(attention_kwargs)}")
        execution = self._execution(num_frames=hidden_states.shape[2])
        inputs = block_inputs(
            self._model,
            execution,
            sample_BCTHW=hidden_states,
            timestep=timestep,
            text_BLC=encoder_hidden_states,
            image_BLC=encoder_hidden_states_image,
        )
        forward = WanForward(execution, inputs, embed_patches(self._model, execution, hidden_states))
        for block in self._model.blocks:
            forward.block(block)
        patches_BSP = forward.out(self._model)
        del forward  # or its hidden state would be alive beside the prediction
        prediction = unpatch(patches_BSP, hidden_states.shape, self._model.config.patch_size)
        return Transformer2DModelOutput(sample=prediction) if return_dict else (prediction,)


@contextmanager
def chunked_wan(
    model: nn.Module,
    settings: ChunkSettings,
    *,
    on_chunk: Callable[[], None] = nothing,
    runner: LayerRunner | None = None,
) -> Generator[None]:
    """Make a `WanTransformer3DModel` run chunked within the context, with the attention backend that is set for it.

    See `inject.replace_forward`.

    Raises:
        TypeError: the model is of another class.
        ValueError: it is in training mode, or its attention has fused projections.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    if any(getattr(part, "fused_projections", False) for part in model.modules()):
        raise ValueError("chunked execution needs separate projections: call unfuse_qkv_projections() first")
    with replace_forward(model, WanTransformer3DModel, ChunkedWanForward, settings, on_chunk, runner):
        yield


class WanForward:
    """One forward through the blocks, which update the hidden state (B, S, D) in place."""

    def __init__(self, execution: Execution, block_inputs: WanBlockInputs, hidden_BSD: torch.Tensor) -> None:
        self._execution = execution
        self._inputs = block_inputs
        self._hidden = hidden_BSD
        self._modulation = torch.empty_like(block_inputs.modulation_RB6D, dtype=torch.float32)

    def block(self, block: Any) -> None:
        """Run a `WanTransformerBlock`."""
        keys, values = torch.empty_like(self._hidden), torch.empty_like(self._hidden)
        self._keys_and_values(block, keys, values)
        self._self_attention(block, keys, values)
        del keys, values
        self._cross_attention(block)
        self._feed_forward(block)

    def out(self, model: Any) -> torch.Tensor:
        """Run the last norm and projection; returns patches (B, S, P)."""
        batch, total, width = self._hidden.shape
        patches = self._hidden.new_empty(batch, total, model.proj_out.out_features)
        own = own_weights(model)
        unit_bytes = workspace.out(width=width, patch=model.proj_out.out_features, itemsize=patches.element_size())
        with self._layer("out", own, model.norm_out, model.proj_out, unit_bytes=unit_bytes) as chunks:
            modulation = model.scale_shift_table + self._inputs.steps_RBD.unsqueeze(2)
            for tokens in chunks:
                patches[:, tokens] = model.proj_out(self._modulated(model.norm_out, tokens, modulation))
        return patches

    def _keys_and_values(self, block: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Compute the keys and values of all tokens, and the block's modulation."""
        attn = block.attn1
        modules = (own_weights(block), attn.to_k, attn.norm_k, attn.to_v)
        with self._layer("keys", *modules, unit_bytes=self._keys_bytes) as chunks:
            torch.add(block.scale_shift_table, self._inputs.modulation_RB6D.float(), out=self._modulation)
            for tokens in chunks:
                normed = self._modulated(block.norm1, tokens, self._modulation[:, :, :2])
                values[:, tokens] = attn.to_v(normed)
                keys[:, tokens] = attn.to_k(normed)
                del normed
                key = attn.norm_k(keys[:, tokens])
                self._inputs.rotary.rotate(_heads(attn, key), tokens)
                keys[:, tokens] = key
                del key  # or it would be alive beside the next chunk's

    def _self_attention(self, block: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        attn = block.attn1
        modules = (attn.to_q, attn.norm_q, attn.to_out)
        with self._layer("self_attention", *modules, unit_bytes=self._queries_bytes) as chunks:
            for tokens in chunks:
                query = attn.to_q(self._modulated(block.norm1, tokens, self._modulation[:, :, :2]))
                query = attn.norm_q(query)
                self._inputs.rotary.rotate(_heads(attn, query), tokens)
                query = _attended(attn, query, keys, values)
                self._add(_projected(attn, query), tokens, gate=2)
                del query

    def _cross_attention(self, block: Any) -> None:
        attn, context = block.attn2, self._inputs.context_BLD
        text_tokens = context.shape[1] if attn.add_k_proj is None else _TEXT_TOKENS
        image, text = context[:, :-text_tokens], context[:, -text_tokens:]
        text_pair, image_pair = _key_and_value_like(text), _key_and_value_like(image)
        preparation_bytes = len(context) * max(text.shape[1], image.shape[1]) * self._queries_bytes
        with self._layer(
            "cross_attention",
            block.norm2,
            attn,
            unit_bytes=self._queries_bytes,
            preparation=ChunkableWork(total=1, unit_bytes=preparation_bytes),
        ) as chunks:
            if not self._execution.runner.shape_only:
                _fill(text_pair, text, attn.to_k, attn.norm_k, attn.to_v)
                if attn.add_k_proj is not None:
                    _fill(image_pair, image, attn.add_k_proj, attn.norm_added_k, attn.add_v_proj)
            for tokens in chunks:
                rows = self._hidden[:, tokens]
                query = attn.to_q(block.norm2(rows.float()).type_as(rows))
                query = attn.norm_q(query)
                attended = _attended(attn, query, *text_pair)
                if attn.add_k_proj is not None:
                    attended = attended.add_(_attended(attn, query, *image_pair))
                del query
                rows.add_(_projected(attn, attended))
                del attended

    def _feed_forward(self, block: Any) -> None:
        width, inner = block.ffn.net[-1].out_features, block.ffn.net[-1].in_features
        unit_bytes = workspace.feed_forward(width=width, inner=inner, itemsize=self._hidden.element_size())
        with self._layer("feed_forward", block.ffn, block.norm3, unit_bytes=unit_bytes) as chunks:
            for tokens in chunks:
                made = block.ffn(self._modulated(block.norm3, tokens, self._modulation[:, :, 3:5]))
                self._add(made, tokens, gate=5)
                del made

    @property
    def _keys_bytes(self) -> int:
        return workspace.keys(width=self._hidden.shape[2], itemsize=self._hidden.element_size())

    @property
    def _queries_bytes(self) -> int:
        return workspace.queries(width=self._hidden.shape[2], itemsize=self._hidden.element_size())

    def _modulated(self, norm: nn.Module, tokens: slice, modulation_RB2D: torch.Tensor) -> torch.Tensor:
        """Return some tokens (B, n, D), normalised in fp32, then shifted and scaled by their time step's modulation."""
        rows = self._hidden[:, tokens]
        normed: torch.Tensor = norm(rows.float())
        for run, part in self._inputs.runs.within(tokens):
            shift, scale = modulation_RB2D[run, :, :1], modulation_RB2D[run, :, 1:]
            normed[:, part].mul_(1 + scale).add_(shift)
        return normed.type_as(rows)

    def _add(self, update: torch.Tensor, tokens: slice, gate: int) -> None:
        """Add a layer's result to some tokens in fp32, multiplied by row `gate` of the modulation."""
        rows = self._hidden[:, tokens]
        update = update.float()
        for run, part in self._inputs.runs.within(tokens):
            update[:, part].mul_(self._modulation[run, :, gate : gate + 1])
        rows.copy_(update.add_(rows))

    @contextmanager
    def _layer(
        self, kind: LayerKind, *modules: nn.Module, unit_bytes: int, preparation: ChunkableWork | None = None
    ) -> Generator[Iterator[slice]]:
        """Run a layer call within the context; yields its chunks. `unit_bytes` are for one token of one branch."""
        batch, total, _ = self._hidden.shape
        with self._execution.layer(
            kind,
            *modules,
            total=total,
            unit_bytes=batch * unit_bytes,
            preparation=preparation,
            smallest=min(_FEWEST_TOKENS, total),
            result_excluded=True,
        ) as call:
            yield iter(()) if self._execution.runner.shape_only else self._execution.chunks(call)


def _key_and_value_like(context_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(context_BLD), torch.empty_like(context_BLD)


def _fill(
    key_and_value: tuple[torch.Tensor, torch.Tensor],
    context_BLD: torch.Tensor,
    to_key: nn.Module,
    norm: nn.Module,
    to_value: nn.Module,
) -> None:
    key, value = key_and_value
    key.copy_(norm(to_key(context_BLD)))
    value.copy_(to_value(context_BLD))


def _attended(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return attention of queries (B, n, D) to (B, L, D), on the backend that is set in the attention's processor."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    backend = attn.processor._attention_backend
    attended: torch.Tensor = dispatch_attention_fn(
        _heads(attn, query), _heads(attn, key), _heads(attn, value), backend=backend
    )
    return attended.flatten(2, 3).type_as(query)


def _heads(attn: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, n, D) as heads (B, n, H, d)."""
    return tokens.view(*tokens.shape[:2], attn.heads, -1)


def _projected(attn: Any, attended: torch.Tensor) -> torch.Tensor:
    linear, dropout = attn.to_out
    return dropout(linear(attended))
