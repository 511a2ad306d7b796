"""What is asked for, and what may be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import BadInputError
from ..families import Architecture, VideoSize, family_of
from ..placement.precision import AUTO, PRECISIONS
from ..units import format_gib


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One video of one model. Raises `BadInputError` for what no budget could make.

    `allow_approximate`: where no exact way fits, one whose result is close to the exact one may be taken. `clips`: so
    many such videos are sampled together.
    """

    architecture: Architecture
    size: VideoSize
    guidance: bool = True
    precision: str = AUTO
    allow_approximate: bool = False
    clips: int = 1

    def __post_init__(self) -> None:
        family_of(self.architecture).facts.check(self.size)
        if self.precision != AUTO and self.precision not in PRECISIONS:
            choices = ", ".join((AUTO, *PRECISIONS))
            raise BadInputError(f"'{self.precision}' is no precision", f"choose one of {choices}")

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
class Budget:
    """Device memory that may be used.

    `limit_bytes` is the user's number; None leaves it to what is free. `reserve_bytes` stays unused for others.
    `host_free_bytes` is what is free of host memory with the model loaded; None where that is no limit of its own (on
    the CPU, whose memory is the device's).
    """

    free_bytes: int
    limit_bytes: int | None = None
    reserve_bytes: int = 0
    host_free_bytes: int | None = None

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
                f"{format_gib(self.usable_bytes + self.reserve_bytes)} that could be used",
                "lower the reserve or free device memory",
            )

    @property
    def usable_bytes(self) -> int:
        limit_bytes = self.free_bytes if self.limit_bytes is None else min(self.limit_bytes, self.free_bytes)
        return limit_bytes - self.reserve_bytes

    def host_allows(self, host_bytes: int) -> bool:
        return self.host_free_bytes is None or host_bytes <= self.host_free_bytes
