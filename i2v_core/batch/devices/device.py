"""A device as the engine sees it, and this machine's own. A host that shares its device gives an adapter of its own."""

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


class DeviceLostError(Exception):
    """The device itself has failed, whatever it was doing."""


class PlannedDevice(Protocol):
    """What must be known of a device to choose its jobs."""

    @property
    def name(self) -> str:
        """Unique among the engine's devices."""
        ...

    def budget(self, architecture: Architecture) -> Budget:
        """What plans of a model are made for."""
        ...

    def facts(self, architecture: Architecture) -> DeviceFacts: ...

    def room(self) -> DeviceMemory:
        """Memory as it is now; what the engine's own stages hold is not counted as others'."""
        ...


class BatchDevice(PlannedDevice, Protocol):
    """What the engine asks of a device. Its methods are called from several threads."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def attention(self) -> AttentionBackend: ...

    def stage(self, stage: Stage, plan: Plan) -> AbstractContextManager[None]:
        """Around a stage, in its thread."""
        ...

    def make_room(self) -> None:
        """Free what others hold and can be had. Called when memory has run out."""
        ...

    def free_bytes(self) -> int | None: ...

    def concluded(self, report: StageReport, *, alone: bool) -> None:
        """A stage has ended; `alone` unless another ran on the device at the same time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStatus:
    """What a page shows of a device. `waits` says what each stage that is not let in is waiting for."""

    name: str
    room: DeviceMemory
    reserved_bytes: int
    jobs: tuple[int, ...]
    waits: tuple[str, ...]


def _used_host_bytes() -> int:
    """What others than this process take of the machine's memory."""
    memory = psutil.virtual_memory()
    own_bytes = psutil.Process(os.getpid()).memory_info().rss
    return max(0, int(memory.total - memory.available - own_bytes))


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalDevice:
    """A device of this machine that the engine has to itself, but for other programs.

    `limit_bytes` is what may be used of it (None: all), `reserve_bytes` what stays free.
    """

    torch_device: torch.device
    limit_bytes: int | None = None
    reserve_bytes: int = 0
    attention: AttentionBackend = AttentionBackend.SDPA
    calibration: CalibrationStore | None = None
    # Of the CPU's memory, since what a process of ours takes of it cannot be told from the rest later.
    _others_at_first_bytes: int = field(default_factory=_used_host_bytes)

    @property
    def name(self) -> str:
        return str(self.torch_device)

    def budget(self, architecture: Architecture) -> Budget:
        return with_model_loaded(self.empty_budget(), architecture)

    def empty_budget(self) -> Budget:
        """As long as no model is loaded."""
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
        # A stream of its own, else what runs in two threads would queue up in one.
        with torch.cuda.device(self.torch_device), torch.cuda.stream(torch.cuda.Stream(self.torch_device)):
            try:
                yield
            finally:
                # Another stage's stream cannot use the blocks that this one's has left in the allocator.
                torch.cuda.empty_cache()

    def make_room(self) -> None:
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        if self.torch_device.type != "cuda":
            return None
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def concluded(self, report: StageReport, *, alone: bool) -> None:
        # The allocator's peak is of all that runs on the device; on the CPU each stage counts its own.
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
    """What is left of a budget when the model lies in host memory, in 16 bits as published models do."""
    if budget.host_free_bytes is None:
        return budget
    return replace(budget, host_free_bytes=max(0, budget.host_free_bytes - loaded_bytes(architecture, torch.float16)))


def local_devices(limit_bytes: int | None, reserve_bytes: int, calibration: CalibrationStore) -> list[LocalDevice]:
    """Every card of this machine, or its CPU where there is none."""
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
