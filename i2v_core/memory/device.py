"""Facts about the device that a plan is made for, and recognition of its out-of-memory errors."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from .calibration import UNCALIBRATED, Calibration

logger = logging.getLogger(__name__)

# CUDA compute capability from which bf16 and fp16 are fast: Ampere (8.0) and Turing (7.0 has the tensor cores too).
_BF16_CAPABILITY, _FP16_CAPABILITY = (8, 0), (7, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """Facts of a device that planning needs."""

    device: str
    """The device as PyTorch writes it, such as "cuda:0"."""

    name: str

    precisions: tuple[torch.dtype, ...]
    """Precisions that the device runs fast, best first."""

    calibration: Calibration = UNCALIBRATED
    """Ratios of measured to predicted peaks of earlier runs of the model on it."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


def device_facts(device: torch.device) -> DeviceFacts:
    """Return the facts of a device of this machine.

    The CPU runs fp32 best, and bf16 if need be; backends other than CUDA run fp16 fast.
    """
    return DeviceFacts(device=str(device), name=_name(device), precisions=_precisions(device))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _precisions(device: torch.device) -> tuple[torch.dtype, ...]:
    if device.type == "cpu":
        return (torch.float32, torch.bfloat16)
    if device.type != "cuda":
        return (torch.float16, torch.float32)
    capability = torch.cuda.get_device_capability(device)
    fast = [torch.bfloat16] if capability >= _BF16_CAPABILITY else []
    fast += [torch.float16] if capability >= _FP16_CAPABILITY else []
    return (*fast, torch.float32)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device ran out of memory.

    That is a `torch.OutOfMemoryError`, an `AcceleratorError` of CUDA code 2, a cuBLAS handle that cannot be created, or
    the asynchronous allocator's message.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    message = str(error).lower()
    accelerator_error = getattr(torch, "AcceleratorError", ())
    if isinstance(error, accelerator_error):
        return getattr(error, "error_code", None) == 2 or "out of memory" in message
    return isinstance(error, RuntimeError) and any(
        sign in message for sign in ("out of memory", "cublas_status_alloc_failed", "allocation on device")
    )


def empty_allocator_cache(device: torch.device) -> None:
    """Return the memory that a failed attempt left in the allocator to the device."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device)  # takes the CUDA error that the next operation would report again
    except RuntimeError as error:
        logger.debug("the device reported again: %s", error)
    torch.cuda.empty_cache()
