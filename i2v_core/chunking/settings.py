"""What a caller decides about chunked execution."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSettings:
    """How finely the denoiser is cut.

    workspace_bytes: the temporary memory that one layer call may take beside the hidden state and the skip
        connections. A layer whose whole call needs no more runs whole; others run in the largest chunks that fit.
        A layer of which even the smallest chunk (one frame, or one row of pixels over all frames) needs more runs
        with the smallest chunk: `workspace_bytes` is then exceeded.
    offload_skips: keep skip connections in host memory (pinned, for a CUDA device) from where they are made to where
        they are used.
    """

    workspace_bytes: int
    offload_skips: bool = False

    def __post_init__(self) -> None:
        if self.workspace_bytes < 1:
            raise ValueError(f"workspace_bytes must be positive, got {self.workspace_bytes}")
