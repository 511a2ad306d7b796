"""What every model family offers. A new family is one file that makes an object of this shape.

Shape legend: B batch (guidance branches), C latent channels, T latent frames, F pixel frames, H/W height and width
(latent space after B, C, T; pixel space after F).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..chunking import ChunkSettings, LayerRunner
from ..decoding import TilingSettings
from .facts import FamilyFacts, VideoSize
from .model import NO_FILES, Architecture, I2VModel, WeightFiles

TensorMap = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placed:
    """A component that is ready to run on `device` in `dtype`, whichever its parameters are in between its calls.

    `runner` brings in the weights of a component that was placed to run layer by layer.
    """

    module: Any
    device: torch.device
    dtype: torch.dtype
    runner: LayerRunner


class Place(Protocol):
    """Makes a component ready to run for as long as the context lasts: by its own forward, or layer by layer."""

    def __call__(self, component: str, *, by_layer: bool = False) -> AbstractContextManager[Placed]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the user asks of the video. `image_FHWC` is (F, H, W, 3) in 0…1; only frame 0 is used.

    Fields with a default are those that not every family has a use for (`FamilyFacts.takes`). `fps` is the frame rate
    to imagine, `motion_bucket` how much is to move, `noise_augmentation` the deviation of noise added to the picture,
    in -1…1.
    """

    image_FHWC: Tensor
    text: str = ""
    negative_text: str = ""
    fps: int = 16
    motion_bucket: int = 127
    noise_augmentation: float = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoiser:
    """A component that the sampler runs: at timesteps from `from_timestep` up, and below that of the one before."""

    component: str
    from_timestep: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What the denoiser is told, on the CPU: its keyword arguments for each guidance branch, with B = 1.

    `negative` is None where the plan has no guidance. `preview_factors` (C + 1, 3) turn a latent pixel and a one into
    red, green and blue. `reports` say what encoding took, for the report of the whole run.
    """

    family: str
    size: VideoSize
    positive: TensorMap
    negative: TensorMap | None
    preview_factors: Tensor
    reports: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One component's work within a stage. `run` makes its own inputs, so that the same code can run on meta tensors,
    where its memory is predicted without weights. `passes` is how often it runs, one after another; `depends_on_size`
    says whether the video's size matters to it, `by_layer` whether it runs layer by layer. `read_in_place` names parts
    that are not called: their weights are read where they lie, and are not brought to the device when others stream.
    """

    name: str
    component: str
    run: Callable[[Placed], object]
    passes: int = 1
    depends_on_size: bool = True
    by_layer: bool = False
    read_in_place: frozenset[str] = frozenset()


class Family(Protocol):
    """Facts and behaviour of one model family."""

    @property
    def facts(self) -> FamilyFacts: ...

    def denoisers(self, architecture: Architecture) -> tuple[Denoiser, ...]:
        """What the sampler runs, in the order of the steps: one, or experts that take over from one another."""
        ...

    @property
    def decoder(self) -> str:
        """Name of the component that turns latents into frames."""
        ...

    def recognises(self, folder: Path) -> bool:
        """Whether a folder in diffusers layout says that it is of this family."""
        ...

    def architecture(self, folder: Path, files: WeightFiles = NO_FILES) -> Architecture:
        """From the configs, and headers of `files`, without weights. Raises `ModelFolderError` for those that cannot be
        used. `files` are of components in `facts.from_files`.
        """
        ...

    def load(self, folder: Path, files: WeightFiles = NO_FILES) -> I2VModel:
        """Raises `ModelFolderError` naming every missing or damaged file."""
        ...

    def stored_weights(self, weights: str, config: Mapping[str, Any]) -> dict[str, list[str]]:
        """Names of a denoiser's weights by the quantised format that they are stored in.

        `weights` names a file, or one format for all of them; `config` is the denoiser's. Called only where the
        denoiser is in `facts.from_files`. Raises `BadInputError` or `ModelFolderError` for what cannot be used.
        """
        ...

    def skeleton(self, architecture: Architecture, component: str) -> nn.Module:
        """The component without weights, on the current default device (meta, when predicting)."""
        ...

    def full_precision_components(self, architecture: Architecture, *, decoding: bool) -> frozenset[str]:
        """Components that the model's own config wants in fp32 whatever the plan's precision, in decode or before."""
        ...

    def encode_workloads(
        self, architecture: Architecture, size: VideoSize, guidance: bool, pieces: TilingSettings
    ) -> tuple[Workload, ...]: ...

    def denoise_workload(self, architecture: Architecture, size: VideoSize, branches: int) -> Workload:
        """One pass of a denoiser; of whichever, where there are several."""
        ...

    def decode_workload(self, size: VideoSize, pieces: TilingSettings) -> Workload:
        """One chunk of frames."""
        ...

    def decode_chunk_sizes(self, size: VideoSize, of_use: int) -> Sequence[int]:
        """How many frames the decoder may take at once with the result of all at once: from many to few.

        More than `of_use` would save no time. Where the decoder looks at all frames, that is one number, all of them.
        """
        ...

    def cuts_frames(self, architecture: Architecture) -> bool:
        """Whether the autoencoder can run in tiles with the result of whole frames."""
        ...

    def encode(
        self,
        model: I2VModel,
        prompt: Prompt,
        size: VideoSize,
        guidance: bool,
        pieces: TilingSettings,
        place: Place,
        on_chunk: Callable[[], None],
    ) -> Conditioning:
        """`pieces` are for the autoencoder, which takes the picture."""
        ...

    def denoise(self, denoiser: nn.Module, latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
        """The denoiser's prediction, (B, C, T, H, W); what it predicts is the scheduler's to know."""
        ...

    def guidance_scale(self, cfg: float, latent_frames: int) -> float | Tensor:
        """What the difference of the branches is multiplied by: one number, or one for each frame (1, 1, T, 1, 1)."""
        ...

    def inputs_for_frames(self, inputs: TensorMap, frames: Tensor) -> TensorMap:
        """A branch's inputs for a denoiser that is given these latent frames of the clip alone: their indices (t,),
        rising, `facts.anchor_frames` first. What tells a frame its place in the clip must go on telling that.
        """
        ...

    def chunked(
        self, denoiser: nn.Module, settings: ChunkSettings, *, runner: LayerRunner, on_chunk: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """While the context lasts the denoiser runs in pieces, with the same result; `on_chunk` is called at least
        once a piece.
        """
        ...

    def latents_to_host(self, architecture: Architecture, latents_BCTHW: Tensor, inputs: TensorMap) -> Tensor:
        """The sampler's latents as the host's LATENT: unscaled; frames on the batch axis for an image VAE. `inputs` are
        those of the positive branch, on the CPU, of which some may belong into the result.
        """
        ...

    def decoded_frames(self, samples: Tensor) -> int:
        """How many frames the host's LATENT samples decode to."""
        ...

    def decode(
        self,
        decoder: Placed,
        samples: Tensor,
        first_frame: int,
        pieces: TilingSettings,
        on_chunk: Callable[[], None],
    ) -> Iterator[Tensor]:
        """Chunks of frames (f, H, W, 3) in 0…1, fp32, in host memory: in order, from `first_frame` on.

        An image autoencoder takes up at any frame. A causal one runs again through the frames before, which fill its
        cache, and does not give them out a second time.
        """
        ...
