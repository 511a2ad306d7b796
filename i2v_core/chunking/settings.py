"""Settings of chunked execution."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSettings:
    """Settings of chunked execution."""

    workspace_bytes: int
    """Temporary memory that one layer call may take beside the hidden state and the skip connections.

    A layer that needs no more runs unchunked; others run in the largest chunks that fit. Where even the smallest chunk
    (one frame, or one row of pixels over all frames) needs more, that chunk runs, and `workspace_bytes` is exceeded."""

    offload_skips: bool = False
    """Keep skip connections in host memory (pinned, for a CUDA device) until they are used."""

    def __post_init__(self) -> None:
        if self.workspace_bytes < 1:
            raise ValueError(f"workspace_bytes must be positive, got {self.workspace_bytes}")
