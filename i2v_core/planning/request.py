"""The input of a plan: the video that is requested, and the memory that may be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import BadInputError
from ..families import Architecture, VideoSize, family_of
from ..memory.device_memory import DeviceMemory
from ..placement.precision import AUTO, PRECISIONS
from ..units import format_gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One video of one model. Raises `BadInputError` for what no budget could make."""

    architecture: Architecture
    size: VideoSize

    guidance: bool = True
    """Classifier-free guidance: two denoiser branches a step."""

    precision: str = AUTO
    """One of `PRECISIONS`, or the best that fits of those which the device runs well."""

    allow_approximate: bool = False
    """Where no exact settings fit, settings whose result is close to the exact one may be used."""

    clips: int = 1
    """How many such videos are sampled together."""

    def __post_init__(self) -> None:
        family_of(self.architecture).facts.check(self.size)
        if self.precision != AUTO and self.precision not in PRECISIONS:
            choices = ", ".join((AUTO, *PRECISIONS))
            raise BadInputError(f"'{self.precision}' is not a valid precision", f"choose one of {choices}")

    @property
    def branches(self) -> int:
        """Denoiser passes a step: one with the prompt, and with guidance one with the negative prompt."""
        return 2 if self.guidance else 1

    def precisions(self, fast: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
        """The precisions to try, best first: the user's choice, or those the device runs well.

        Each takes less memory than those before it: where one does not fit, none of the same size would.
        """
        if self.precision != AUTO:
            return (PRECISIONS[self.precision],)
        by_bytes: dict[int, torch.dtype] = {}
        for dtype in fast:
            if dtype.itemsize < min(by_bytes, default=dtype.itemsize + 1):
                by_bytes[dtype.itemsize] = dtype
        return tuple(by_bytes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget(DeviceMemory):
    """Memory that a plan may use: of the device, and of the host. Raises `BadInputError` where none is usable.

    Device memory is as `DeviceMemory` has it, which batches read before each stage.
    """

    host_free_bytes: int | None = None
    """Free host memory with the model loaded; None where there is no such limit (on the CPU, where it is the device's
    own)."""

    def __post_init__(self) -> None:
        if self.limit_bytes is not None and self.limit_bytes <= 0:
            raise BadInputError(
                f"a budget of {self.limit_bytes} bytes leaves nothing to run in", "give a size above zero"
            )
        if self.reserve_bytes < 0:
            raise BadInputError(f"a reserve of {self.reserve_bytes} bytes is not possible", "give zero or more")
        if self.usable_bytes <= 0:
            raise BadInputError(
                f"a reserve of {format_gib(self.reserve_bytes)} leaves nothing of the "
                f"{format_gib(self.available_bytes)} that could be used",
                "lower the reserve or free device memory",
            )

    @classmethod
    def of(cls, memory: DeviceMemory, host_free_bytes: int | None) -> Budget:
        """The memory of a device as it was read, with free host memory."""
        return cls(
            free_bytes=memory.free_bytes,
            limit_bytes=memory.limit_bytes,
            reserve_bytes=memory.reserve_bytes,
            others_bytes=memory.others_bytes,
            host_free_bytes=host_free_bytes,
        )
