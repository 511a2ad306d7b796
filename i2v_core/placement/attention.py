"""Choice of the kernels that attention runs on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class AttentionBackend(str, Enum):
    """Attention implementations, none of which needs more memory than its output."""

    SDPA = "sdpa"
    """PyTorch's own fused attention."""

    XFORMERS = "xformers"
    """xformers, where it is installed."""

    SAGE = "sage"
    """SageAttention, where it is installed. It computes in 8 bits, so its result is close to the others', not equal."""


@contextmanager
def attention(module: nn.Module, backend: AttentionBackend) -> Generator[None]:
    """Run a diffusers module's attention on the backend within the context, and restore it afterwards."""
    with _CONTEXTS[backend](module):
        yield


@contextmanager
def _sdpa(_: nn.Module) -> Generator[None]:
    yield


@contextmanager
def _xformers(module: nn.Module) -> Generator[None]:
    from diffusers.models.attention_dispatch import AttentionBackendName
    from diffusers.models.attention_processor import XFormersAttnProcessor

    model: Any = module
    before = model.attn_processors
    if all(hasattr(processor, "_attention_backend") for processor in before.values()):
        with _dispatched(before.values(), AttentionBackendName.XFORMERS):
            yield
        return
    # `set_attn_processor` empties the dictionary that it is given, so each call gets a copy.
    model.set_attn_processor(dict.fromkeys(before, XFormersAttnProcessor()))
    try:
        yield
    finally:
        model.set_attn_processor(dict(before))


@contextmanager
def _dispatched(processors: Iterable[Any], backend: object) -> Generator[None]:
    """Set the backend of processors that leave the choice of kernel to diffusers' dispatcher, as newer models' do."""
    before = [(processor, processor._attention_backend) for processor in processors]
    try:
        for processor, _ in before:
            processor._attention_backend = backend
        yield
    finally:
        for processor, own in before:
            processor._attention_backend = own


@contextmanager
def _sage(_: nn.Module) -> Generator[None]:
    import sageattention  # pyright: ignore[reportMissingImports]

    with _SageCalls(sageattention.sageattn):  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        yield


_CONTEXTS = {AttentionBackend.SDPA: _sdpa, AttentionBackend.XFORMERS: _xformers, AttentionBackend.SAGE: _sage}


_INPUTS = ("query", "key", "value")


class _SageCalls(TorchFunctionMode):
    """Redirects PyTorch attention calls that SageAttention supports to it, in this thread, within the context."""

    def __init__(self, sageattn: Callable[..., Tensor]) -> None:
        self._sageattn = sageattn

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) <= 3:
            given = {**dict(zip(_INPUTS, args, strict=False)), **kwargs}
            if _sage_supports(given["query"], given):
                causal, scale = given.get("is_causal", False), given.get("scale")
                inputs = [given[name] for name in _INPUTS]
                return self._sageattn(*inputs, tensor_layout="HND", is_causal=causal, sm_scale=scale)
        return func(*args, **kwargs)


def _sage_supports(query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether SageAttention can run a call: half precision, a head width of its kernels, neither mask nor dropout."""
    plain = options.get("attn_mask") is None and not options.get("dropout_p")
    return plain and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] in (64, 96, 128)
