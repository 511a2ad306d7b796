"""Traces of memory, made by running a model's own code on meta tensors: no weights, no values, no GPU."""

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

# Traces share skeletons, whose layers are replaced while one is traced: threads take turns.
_one_at_a_time = RLock()
_before_trace: ContextVar[Callable[[], None]] = ContextVar("before_trace", default=lambda: None)


@contextmanager
def interruptible(check: Callable[[], None]) -> Generator[None]:
    """Call `check` before every trace of this thread. It may raise, to give up a plan that nobody waits for."""
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
        # Not `module.to`: diffusers' own warns of a cast that loses precision, which nothing on meta does. Some
        # parameters are made from values, and so are on the CPU.
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
    """Bytes of host memory that the loaded model needs, if its weights are stored in `dtype`."""
    family = family_of(architecture)
    workloads = family.encode_workloads(
        architecture, family.facts.default_size, guidance=True, tiling=ONE_FRAME_UNTILED
    )
    denoisers = {it.component for it in family.denoisers(architecture)}
    components = {*denoisers, family.decoder, *(workload.component for workload in workloads)}
    return sum(weights_bytes(architecture, component, dtype) for component in components)


def _module_bytes(module: nn.Module) -> int:
    bytes_of = stored_bytes(module)
    return sum(rounded_bytes(bytes_of(tensor)) for tensor in all_tensors(module))


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedCall:
    """A layer call of a traced forward, all its chunks together."""

    unit: Unit
    """The dimension that is chunked."""

    chunk_size: int
    chunks: int

    before_bytes: int
    """Live tensors when the call begins, weights left out."""

    activation_bytes: int
    """Live tensors at the call's peak, everything that waits outside of the layer included, weights left out."""

    modules: tuple[nn.Module, ...]
    """Those that hold the call's weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """One pass of `module` as layer calls, in order, within one workspace."""

    module: nn.Module
    calls: tuple[TracedCall, ...]

    offloaded_bytes: int
    """Tensors in host memory at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTemplate:
    """A layer call from which the traced call for any workspace is computed."""

    call: LayerCall

    before_bytes: int
    """Live tensors when the call begins, weights and workspace left out."""

    after_bytes: int
    """Live tensors when it is done, weights and workspace left out."""

    def for_workspace(self, times: int) -> TracedCall:
        call = self.call.with_limit(times * self.call.limit_bytes)
        around_bytes = self.before_bytes if call.workspace_holds_result else self.after_bytes
        return TracedCall(
            unit=call.unit,
            chunk_size=call.chunk_size,
            chunks=-(-call.total // call.chunk_size),
            before_bytes=self.before_bytes,
            activation_bytes=around_bytes + call.workspace_bytes,
            modules=call.modules,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTemplate:
    """One pass of `module`, from which the trace for any workspace is computed without running the module again.

    That is possible because live tensors around the layers are the same however finely layers are chunked.
    """

    module: nn.Module
    calls: tuple[CallTemplate, ...]

    offloaded_bytes: int
    """Tensors in host memory at most."""

    def for_workspace(self, times: int) -> LayerTrace:
        """The pass in a workspace this many times as large as the template's."""
        calls = tuple(call.for_workspace(times) for call in self.calls)
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
    """One pass of a denoiser, named by its component; without a name, of the first."""
    component = component or family_of(architecture).denoisers(architecture)[0].component
    template = denoiser_template(architecture, size, branches, dtype, component, offload_skips=settings.offload_skips)
    return template.for_workspace(settings.workspace_bytes)


@lru_cache(maxsize=256)
def denoiser_template(
    architecture: Architecture,
    size: VideoSize,
    branches: int,
    dtype: torch.dtype,
    component: str,
    *,
    offload_skips: bool,
) -> TraceTemplate:
    """One pass of a denoiser in a workspace of one byte."""
    family = family_of(architecture)
    module = skeleton(architecture, component, dtype)
    settings = ChunkSettings(workspace_bytes=1, offload_skips=offload_skips)
    workload = family.denoise_workload(architecture, size, branches)
    with tracing() as meter:
        tracer = _CallTracer(meter)
        with family.chunked(module, settings, runner=tracer, on_chunk=lambda: None):
            workload.run(_on_meta(module, dtype, tracer))
    return tracer.template(module)


def autoencoder_template(module: nn.Module, workload: Workload, dtype: torch.dtype) -> TraceTemplate:
    """One pass of an autoencoder whose workload runs layer by layer in tiles."""
    with tracing() as meter:
        tracer = _CallTracer(meter)
        workload.run(_on_meta(module, dtype, tracer))
    return tracer.template(module)


class _CallTracer(ShapeOnlyRunner):
    """Records every layer call with the live tensors around it."""

    def __init__(self, meter: StorageMeter) -> None:
        self._calls: list[CallTemplate] = []
        self._meter = meter

    @contextmanager
    def enter(self, call: LayerCall) -> Generator[None]:
        before_bytes = self._meter.current_bytes
        yield
        self._calls.append(CallTemplate(call=call, before_bytes=before_bytes, after_bytes=self._meter.current_bytes))

    def template(self, module: nn.Module) -> TraceTemplate:
        return TraceTemplate(module=module, calls=tuple(self._calls), offloaded_bytes=self._meter.host_peak_bytes)


@lru_cache(maxsize=64)
def streamed_bytes(
    architecture: Architecture,
    component: str,
    dtype: torch.dtype,
    passes: int,
    read_in_place: frozenset[str] = frozenset(),
) -> int:
    """The most bytes on the device of a component's weights that are streamed one leaf module at a time.

    The largest leaf decides; with several passes the order of leaves is known from the second on, the next one is
    prefetched, and the largest two decide.
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
    """Count allocations on meta, those of attention as a fused kernel makes them."""
    _before_trace.get()()
    with (
        _one_at_a_time,
        torch.no_grad(),
        StorageMeter(device_type="meta", run=KnownShapes()) as meter,
        fused_attention(),
    ):
        yield meter
