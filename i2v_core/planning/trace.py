"""Predicting memory by running a model's own code on meta tensors: no weights, no values, no GPU."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import cast

import torch
from torch import nn

from ..chunking import ChunkSettings, LayerCall, LayerRunner, ShapeOnlyRunner, Unit
from ..decoding import ONE_FRAME_UNTILED
from ..families import Architecture, Placed, VideoSize, Workload, family_of
from ..memory.meter import StorageMeter, fused_attention, rounded_bytes
from ..memory.shapes import KnownShapes
from ..placement.precision import compute_dtypes
from ..placement.quantized import stored_bytes
from ..placement.swap import all_tensors, own_tensors

META = torch.device("meta")

# Traces share skeletons, which run in pieces while one is traced: threads take turns.
_one_at_a_time = RLock()
_before_trace: ContextVar[Callable[[], None]] = ContextVar("before_trace", default=lambda: None)


@contextmanager
def interruptible(check: Callable[[], None]) -> Generator[None]:
    """`check` is called before every trace of this thread, and may raise to give a plan up that nobody waits for."""
    token = _before_trace.set(check)
    try:
        yield
    finally:
        _before_trace.reset(token)


@lru_cache(maxsize=16)
def skeleton(architecture: Architecture, component: str, dtype: torch.dtype) -> nn.Module:
    """The component on the meta device, built once for a model and a precision."""
    with torch.device(META):
        module = family_of(architecture).skeleton(architecture, component)
        # Not `module.to`: diffusers' own warns of a cast that loses precision, of which there is none on meta. Some
        # parameters are made of numbers, and so on the CPU.
        module = nn.Module.to(module, META, dtype).requires_grad_(False)
    dtype_of = compute_dtypes(module, dtype)
    for tensor in all_tensors(module):
        tensor.data = tensor.data.to(dtype_of(tensor))
    return module


@lru_cache(maxsize=64)
def weights_bytes(architecture: Architecture, component: str, dtype: torch.dtype) -> int:
    """Bytes of the component's parameters and buffers on the device, allocator rounding included."""
    return _module_bytes(skeleton(architecture, component, dtype))


def loaded_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Bytes that the model takes of host memory once loaded, if its weights are stored in `dtype`."""
    family = family_of(architecture)
    workloads = family.encode_workloads(
        architecture, family.facts.default_size, guidance=True, tiling=ONE_FRAME_UNTILED
    )
    denoisers = {it.component for it in family.denoisers(architecture)}
    components = {*denoisers, family.decoder, *(workload.component for workload in workloads)}
    return sum(weights_bytes(architecture, component, dtype) for component in components)


def _module_bytes(module: nn.Module) -> int:
    as_it_lies = stored_bytes(module)
    return sum(rounded_bytes(as_it_lies(tensor)) for tensor in all_tensors(module))


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedCall:
    """One layer call of a traced forward.

    `activation_bytes` is what is live at its peak, everything that waits outside the layer included, weights left out;
    `before_bytes` is what is live when it begins. `modules` hold its weights.
    """

    unit: Unit
    chunk_size: int
    pieces: int
    before_bytes: int
    activation_bytes: int
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """The layer calls of one pass of `module`, in order, and the bytes parked in host memory."""

    module: nn.Module
    calls: tuple[TracedCall, ...]
    offloaded_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlinedCall:
    """A layer call, with what is live when it begins and when it is done, weights and workspace left out."""

    call: LayerCall
    before_bytes: int
    after_bytes: int

    def cut(self, times: int) -> TracedCall:
        call = self.call.with_limit(times * self.call.limit_bytes)
        around_bytes = self.before_bytes if call.workspace_holds_result else self.after_bytes
        return TracedCall(
            unit=call.unit,
            chunk_size=call.chunk_size,
            pieces=-(-call.total // call.chunk_size),
            before_bytes=self.before_bytes,
            activation_bytes=around_bytes + call.workspace_bytes,
            modules=call.modules,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoiserOutline:
    """One pass of `module` in layers, and the bytes parked in host memory.

    What is live around the layers is the same however finely they are cut: one outline does for all workspaces.
    """

    module: nn.Module
    calls: tuple[OutlinedCall, ...]
    offloaded_bytes: int

    def cut(self, times: int) -> LayerTrace:
        """The pass in a workspace so many times as large as that which it was outlined with."""
        calls = tuple(call.cut(times) for call in self.calls)
        return LayerTrace(module=self.module, calls=calls, offloaded_bytes=self.offloaded_bytes)


@lru_cache(maxsize=1024)
def trace_denoiser(
    architecture: Architecture,
    size: VideoSize,
    branches: int,
    dtype: torch.dtype,
    settings: ChunkSettings,
    component: str | None = None,
) -> LayerTrace:
    """One pass of a denoiser (by its component's name; the first, if left out) in outline."""
    component = component or family_of(architecture).denoisers(architecture)[0].component
    outline = outline_denoiser(architecture, size, branches, dtype, component, offload_skips=settings.offload_skips)
    return outline.cut(settings.workspace_bytes)


@lru_cache(maxsize=256)
def outline_denoiser(
    architecture: Architecture,
    size: VideoSize,
    branches: int,
    dtype: torch.dtype,
    component: str,
    *,
    offload_skips: bool,
) -> DenoiserOutline:
    """One pass of a denoiser, in a workspace of one byte."""
    family = family_of(architecture)
    module = skeleton(architecture, component, dtype)
    settings = ChunkSettings(workspace_bytes=1, offload_skips=offload_skips)
    workload = family.denoise_workload(architecture, size, branches)
    with tracing() as meter:
        tracer = _CallTracer(meter)
        with family.chunked(module, settings, runner=tracer, on_chunk=lambda: None):
            workload.run(_on_meta(module, dtype, tracer))
    return tracer.outline(module)


def outline_bands(module: nn.Module, workload: Workload, dtype: torch.dtype) -> DenoiserOutline:
    """An autoencoder's workload that runs layer by layer."""
    with tracing() as meter:
        tracer = _CallTracer(meter)
        workload.run(_on_meta(module, dtype, tracer))
    return tracer.outline(module)


class _CallTracer(ShapeOnlyRunner):
    """Notes every layer call, and what is live around it."""

    def __init__(self, meter: StorageMeter) -> None:
        self._calls: list[OutlinedCall] = []
        self._meter = meter

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        before_bytes = self._meter.current_bytes
        yield
        self._calls.append(OutlinedCall(call=call, before_bytes=before_bytes, after_bytes=self._meter.current_bytes))

    def outline(self, module: nn.Module) -> DenoiserOutline:
        return DenoiserOutline(module=module, calls=tuple(self._calls), offloaded_bytes=self._meter.host_peak_bytes)


@lru_cache(maxsize=64)
def streamed_bytes(
    architecture: Architecture,
    component: str,
    dtype: torch.dtype,
    passes: int,
    read_in_place: frozenset[str] = frozenset(),
) -> int:
    """Bytes that are on the device at once of a component's weights, streamed leaf by leaf, at most.

    Those of the largest leaf; from the second pass on the next leaf is known and fetched ahead, so of the largest two.
    """
    module = skeleton(architecture, component, dtype)
    parts = cast("Iterable[tuple[str, nn.Module]]", module.named_modules())
    streaming = (owner for name, owner in parts if name not in read_in_place)
    leaves = sorted(sum(rounded_bytes(tensor.nbytes) for tensor in own_tensors(owner)) for owner in streaming)
    return sum(leaves[-2:]) if passes > 1 else leaves[-1]


def activation_bytes(module: nn.Module, workload: Workload, dtype: torch.dtype) -> int:
    """Peak bytes of live tensors, weights left out, while the workload runs on the skeleton `module`."""
    with tracing() as meter:
        workload.run(_on_meta(module, dtype, LayerRunner()))
    return meter.peak_bytes


def _on_meta(module: nn.Module, dtype: torch.dtype, runner: LayerRunner) -> Placed:
    return Placed(module=module, device=META, dtype=dtype, runner=runner)


@contextmanager
def tracing() -> Generator[StorageMeter]:
    """Counts what is allocated on meta, with attention counted as a fused kernel allocates it."""
    _before_trace.get()()
    with (
        _one_at_a_time,
        torch.no_grad(),
        StorageMeter(device_type="meta", run=KnownShapes()) as meter,
        fused_attention(),
    ):
        yield meter
