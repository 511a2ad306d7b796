"""A device as the engine sees it, and this machine's own devices. A host that shares its device supplies an adapter."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import psutil
import torch

from ...families import Architecture
from ...memory.calibration import CalibrationStore, calibration_key
from ...memory.device import DeviceFacts, device_facts, is_out_of_memory
from ...memory.device_memory import DeviceMemory
from ...placement.attention import AttentionBackend
from ...planning.plan import Plan, Stage
from ...planning.request import Budget
from ...planning.trace import loaded_bytes
from ...stages import StageReport
from .admission import BlockingReason


class DeviceLostError(Exception):
    """The device itself has failed, whatever it ran."""


class PlannedDevice(Protocol):
    """A device as the scheduler sees it."""

    @property
    def name(self) -> str:
        """Unique among the engine's devices."""
        ...

    def budget(self, architecture: Architecture) -> Budget:
        """Memory that plans of a model may use."""
        ...

    def facts(self, architecture: Architecture) -> DeviceFacts: ...

    def room(self) -> DeviceMemory:
        """Memory as it is now; bytes that the engine's own stages hold do not count as others'."""
        ...


class BatchDevice(PlannedDevice, Protocol):
    """A device that runs stages. Its methods are called from several threads."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def attention(self) -> AttentionBackend: ...

    def stage(self, stage: Stage, plan: Plan) -> AbstractContextManager[None]:
        """Context of a stage, entered in its thread."""
        ...

    def make_room(self) -> None:
        """Free memory that others can give up. Called when memory has run out."""
        ...

    def free_bytes(self) -> int | None: ...

    def concluded(self, report: StageReport, *, alone: bool) -> None:
        """Note that a stage has ended; `alone` unless another ran on the device at the same time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """A device, its memory, and what runs and waits on it."""

    name: str
    room: DeviceMemory
    reserved_bytes: int
    jobs: tuple[int, ...]
    waits: tuple[BlockingReason, ...]
    """Why each waiting stage waits."""
    too_large_now: int = 0
    """Waiting jobs that do not fit beside other programs."""


def _used_host_bytes() -> int:
    """Bytes of the machine's memory that other processes take."""
    memory = psutil.virtual_memory()
    own_bytes = psutil.Process(os.getpid()).memory_info().rss
    return max(0, int(memory.total - memory.available - own_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """A device of this machine that the engine shares with no other user but other programs."""

    torch_device: torch.device
    limit_bytes: int | None = None
    """Bytes that may be used of it; None for all."""
    reserve_bytes: int = 0
    """Bytes that stay free."""
    attention: AttentionBackend = AttentionBackend.SDPA
    calibration: CalibrationStore | None = None
    # For the CPU: read before any stage runs, since later our own memory cannot be told from that of others.
    _others_at_first_bytes: int = field(default_factory=_used_host_bytes)

    @property
    def name(self) -> str:
        return str(self.torch_device)

    def budget(self, architecture: Architecture) -> Budget:
        return with_model_loaded(self.empty_budget(), architecture)

    def empty_budget(self) -> Budget:
        """Budget as long as no model is loaded."""
        on_host = self.torch_device.type == "cpu"
        return Budget.of(self.room(), host_free_bytes=None if on_host else int(psutil.virtual_memory().available))

    def facts(self, architecture: Architecture) -> DeviceFacts:
        facts = device_facts(self.torch_device)
        if self.calibration is None:
            return facts
        key = calibration_key(facts.name, architecture.fingerprint)
        return replace(facts, calibration=self.calibration.calibration(key))

    def room(self) -> DeviceMemory:
        if self.torch_device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
            others_bytes = max(0, total_bytes - free_bytes - torch.cuda.memory_reserved(self.torch_device))
        else:
            total_bytes, others_bytes = int(psutil.virtual_memory().total), self._others_at_first_bytes
        return DeviceMemory(
            free_bytes=total_bytes - others_bytes,
            limit_bytes=self.limit_bytes,
            reserve_bytes=self.reserve_bytes,
            others_bytes=others_bytes,
        )

    @contextmanager
    def stage(self, stage: Stage, plan: Plan) -> Generator[None]:  # noqa: ARG002
        if self.torch_device.type != "cuda":
            with nullcontext():
                yield
            return
        # Each stage has its own stream, else two threads would queue their work in one.
        with torch.cuda.device(self.torch_device), torch.cuda.stream(torch.cuda.Stream(self.torch_device)):
            try:
                yield
            finally:
                # The allocator keeps freed blocks for their stream, where no other stage can use them.
                torch.cuda.empty_cache()

    def make_room(self) -> None:
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        if self.torch_device.type != "cuda":
            return None
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def concluded(self, report: StageReport, *, alone: bool) -> None:
        # The allocator's peak is that of all stages on the device; on the CPU each stage counts its own.
        if self.calibration is None or not (alone or self.torch_device.type == "cpu"):
            return
        plan = report.plan
        self.calibration.record(
            calibration_key(plan.device.name, plan.request.architecture.fingerprint),
            report.stage.value,
            predicted_bytes=plan.prediction(report.stage).peak_bytes,
            measured_bytes=report.measured_peak_bytes,
        )


def with_model_loaded(budget: Budget, architecture: Architecture) -> Budget:
    """The budget less a model in host memory, in 16 bits as published models are."""
    if budget.host_free_bytes is None:
        return budget
    return replace(budget, host_free_bytes=max(0, budget.host_free_bytes - loaded_bytes(architecture, torch.float16)))


def local_devices(limit_bytes: int | None, reserve_bytes: int, calibration: CalibrationStore) -> list[LocalDevice]:
    """All cards of this machine, or its CPU if there is none."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    return [
        LocalDevice(
            torch_device=torch.device(name),
            limit_bytes=limit_bytes,
            reserve_bytes=reserve_bytes,
            calibration=calibration,
        )
        for name in names
    ]


def is_device_failure(error: BaseException) -> bool:
    """Whether an error says that a device can run nothing more in this process."""
    accelerator_error = getattr(torch, "AcceleratorError", ())
    return isinstance(error, (DeviceLostError, accelerator_error)) and not is_out_of_memory(error)
