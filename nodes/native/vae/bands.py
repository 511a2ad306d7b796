"""A pass through an autoencoder in bands: a number of rows of a few frames, as wide as the frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import comfy.ops
import torch
from torch.nn import functional

from ....i2v_core.chunking import ChunkSettings, LayerRunner
from ....i2v_core.chunking.execution import Execution
from ....i2v_core.decoding.causal_row_tiles import CausalRowTiledLayers
from ....i2v_core.decoding.feature_map import FeatureMaps
from ....i2v_core.memory.device import is_out_of_memory
from ....i2v_core.units import GIB, MIB, format_gib
from ..calls import nothing
from ..held_weights import HeldWeightsRunner


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """Size of bands, and where feature maps are kept between layers."""

    workspace_bytes: int
    """Temporary memory of one layer beside the maps that it reads and writes."""
    maps_bytes: int | None = None
    """Feature maps that stay on the device; further ones, and frames that are kept for later ones, are offloaded to
    host memory. None: all stay.
    """

    def __str__(self) -> str:
        stay = "all" if self.maps_bytes is None else format_gib(self.maps_bytes)
        return f"bands of {format_gib(self.workspace_bytes)} a layer, {stay} of the feature maps on the device"


_OFFLOADED_MAPS_BYTES = (2 * GIB, GIB, 512 * MIB, 256 * MIB, 128 * MIB, 64 * MIB, 16 * MIB, 0)
_SMALL_WORKSPACES_BYTES = (16 * MIB, 0)

CANDIDATES: tuple[Bands | None, ...] = (
    None,
    *(Bands(workspace_bytes=size) for size in (GIB, 256 * MIB, 64 * MIB)),
    *(Bands(workspace_bytes=64 * MIB, maps_bytes=size) for size in _OFFLOADED_MAPS_BYTES),
    *(Bands(workspace_bytes=size, maps_bytes=0) for size in _SMALL_WORKSPACES_BYTES),
)
"""Settings from fast to low memory. None: core's own code. All have the same result."""


_Layers = TypeVar("_Layers", bound=CausalRowTiledLayers)


@dataclass(frozen=True, slots=True, kw_only=True)
class BandedPass:
    """Settings and services of one pass."""

    device: torch.device
    dtype: torch.dtype
    bands: Bands
    runner: LayerRunner
    on_band: Callable[[], None] = nothing
    """Called before every band; may raise to cancel."""
    on_full: Callable[[str], None] | None = None
    """Called with the error where the device has no memory left for a feature map, which then is offloaded."""
    on_maps: Callable[[FeatureMaps], None] = lambda _: None
    """Called with the feature maps of the layers that are made for the pass."""
    on_latent_frame: Callable[[], None] = nothing
    """Called when a latent frame is done."""

    def causal_layers(
        self,
        frames: int,
        *,
        replicates: bool = False,
        kind: type[_Layers] = CausalRowTiledLayers,
    ) -> _Layers:
        """Layers of an autoencoder that is causal in time, which run on up to so many frames at a time.

        Args:
            replicates: whether convolutions pad with the nearest pixel and frame, rather than with zeros.
        """
        execution = Execution(
            settings=ChunkSettings(workspace_bytes=max(1, self.bands.workspace_bytes)),
            runner=self.runner,
            on_chunk=self.on_band,
            num_frames=frames,
        )
        maps = FeatureMaps(self.device, self.dtype, self.bands.maps_bytes, groups=0, on_full=self.on_full)
        self.on_maps(maps)
        return kind(execution, maps, replicates=replicates, conv3d=_conv3d)


class BandRunner(HeldWeightsRunner):
    """Holds weights for a layer call, and runs a band again that ran out of memory, after making room for it.

    First maps that are kept for later frames are offloaded, then this and all later bands halved, and at last all other
    maps offloaded. Nothing is computed again but the band that failed.
    """

    def __init__(
        self, device: torch.device, dtype: torch.dtype, on_full: Callable[[str], None] = lambda _: None
    ) -> None:
        super().__init__(device, dtype)
        self.maps: list[FeatureMaps] = []
        """Those of the layers that run."""
        self._on_full = on_full
        self._halvings = 0

    def run_chunk(self, run: Callable[[slice], None], chunk: slice) -> None:
        start, whole = chunk.start, chunk.stop - chunk.start
        while start < chunk.stop:
            size = max(1, -(-whole // 2**self._halvings))
            part = slice(start, min(start + size, chunk.stop))
            problem = _out_of_memory_in(run, part)
            if problem is None:
                start = part.stop
                continue
            self._on_full(problem)
            if not self._make_room(size):
                raise torch.OutOfMemoryError(problem)

    def _make_room(self, size: int) -> bool:
        """Take the next measure for bands of so many rows; returns whether there was one."""
        if any(it.make_room(only_long_lived=True) for it in self.maps):
            return True
        if size > 1:
            self._halvings += 1
            return True
        return any(it.make_room(only_long_lived=False) for it in self.maps)


def _out_of_memory_in(run: Callable[[slice], None], part: slice) -> str | None:
    """Run a part; returns the message where the device runs out of memory, without what the traceback would keep."""
    try:
        run(part)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return str(error)
    return None


def _conv3d(
    tile: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> torch.Tensor:
    """PyTorch's 3D convolution, or the library's called directly where PyTorch chooses badly.

    On CUDA where core goes around a defect; on the CPU since PyTorch takes its own slow code for inputs of few rows.
    """
    if _needs_cudnn(tile, weight):
        made = torch.cudnn_convolution(
            tile, weight, padding, stride, (1, 1, 1), 1, benchmark=False, deterministic=False, allow_tf32=True
        )
        return made if bias is None else made.add_(bias.view(1, -1, 1, 1, 1))
    if tile.device.type == "cpu" and tile.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        return torch.mkldnn_convolution(tile, weight, bias, padding, stride, (1, 1, 1), 1)
    return functional.conv3d(tile, weight, bias, stride, padding)


def _needs_cudnn(tile: torch.Tensor, weight: torch.Tensor) -> bool:
    around_defect = getattr(comfy.ops, "NVIDIA_MEMORY_CONV_BUG_WORKAROUND", False)
    return around_defect and tile.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)
