"""ComfyUI nodes and routes, kept thin. Only this package imports ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import queue_routes, routes
from .batch import Batch
from .budget import VRAMBudget
from .decode import VAETiledDecode
from .encode import Encode
from .latents import LoadLatent, SaveLatent
from .loader import Loader
from .memory_report import MemoryReport
from .sampler import ChunkedSampler
from .save_video import SaveVideo
from .vram_fit import VRAMFit


class I2VBudgetExtension(ComfyExtension):
    async def on_load(self) -> None:
        routes.register()
        queue_routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Loader,
            VRAMBudget,
            Encode,
            ChunkedSampler,
            VAETiledDecode,
            SaveVideo,
            SaveLatent,
            LoadLatent,
            MemoryReport,
            Batch,
            VRAMFit,
        ]
