"""The interface of model families. A new family is a module or package that defines an object of type `Family`.

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
    """A component that is ready to run."""

    module: Any

    device: torch.device
    """The device to run on. Between calls its parameters may be elsewhere, since they may be streamed."""

    dtype: torch.dtype
    """The compute precision, which parameters may differ from between calls."""

    runner: LayerRunner
    """Loads the weights of a component that was placed to run layer by layer."""


class Place(Protocol):
    """Places a component to run within the context, by its own forward or layer by layer."""

    def __call__(self, component: str, *, by_layer: bool = False) -> AbstractContextManager[Placed]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The user's inputs for a video. `FamilyFacts.optional_inputs` says which of the fields with defaults a family
    uses.
    """

    image_FHWC: Tensor
    """Picture in 0…1, of which only frame 0 is used."""

    text: str = ""
    negative_text: str = ""

    fps: int = 16
    """Frame rate that the model is conditioned on."""

    motion_bucket: int = 127
    """Amount of motion."""

    noise_augmentation: float = 0.02
    """Standard deviation of the noise that is added to the picture in -1…1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoiser:
    """A component that the sampler runs at timesteps of at least `from_timestep`, below that of the one before."""

    component: str
    from_timestep: float = -math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Inputs of the denoiser beside latents and timestep, made from the prompt; all tensors are on the CPU."""

    family: str
    size: VideoSize

    positive: TensorMap
    """The denoiser's keyword arguments for the positive branch, with B = 1."""

    negative: TensorMap | None
    """Keyword arguments for the negative branch; None for a plan without guidance."""

    preview_factors: Tensor
    """Matrix (C + 1, 3) from a latent pixel and a constant 1 to red, green and blue."""

    reports: tuple[Mapping[str, Any], ...] = ()
    """Reports of the encode stage, for the report of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One component's work within a stage, whose memory can be predicted by running it on meta tensors."""

    name: str
    component: str

    run: Callable[[Placed], object]
    """Runs one pass on inputs of its own, with undefined values."""

    passes: int = 1
    """Number of passes, one after another."""

    depends_on_size: bool = True
    """Whether memory depends on the video's size."""

    by_layer: bool = False
    """Whether the component runs layer by layer."""

    read_in_place: frozenset[str] = frozenset()
    """Submodules that are never called: their weights are read in host memory, and not copied to the device when the
    others are streamed."""


class Family(Protocol):
    """Facts and behaviour of one model family.

    Example: load a model, encode a prompt, and run one step of its denoiser.

        model = load_model(folder)
        family = family_of(model.architecture)
        conditioning = family.encode(model, prompt, size, guidance, tiling, place, on_chunk)
        with place("unet") as unet:
            prediction = family.denoise(unet.module, latents, timestep, conditioning.positive)
    """

    @property
    def facts(self) -> FamilyFacts:
        """Constants of the family."""
        ...

    def denoisers(self, architecture: Architecture) -> tuple[Denoiser, ...]:
        """Return the components that the sampler runs, in the order of the steps: one, or several experts."""
        ...

    @property
    def decoder(self) -> str:
        """Name of the component that decodes latents to frames."""
        ...

    def recognises(self, folder: Path) -> bool:
        """Whether a folder in diffusers layout holds a model of this family."""
        ...

    def architecture(self, folder: Path, files: WeightFiles = NO_FILES) -> Architecture:
        """Return the architecture of a folder from its configs and the headers of `files`, without reading weights.

        `files` are of components in `facts.from_files`.

        Raises:
            ModelFolderError: a config or a file cannot be used.
        """
        ...

    def load(self, folder: Path, files: WeightFiles = NO_FILES) -> I2VModel:
        """Load a folder into host RAM.

        Raises:
            ModelFolderError: names every missing or damaged file.
        """
        ...

    def stored_weights(self, weights: str, config: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return the names of a denoiser's weights by the quantised format that they are stored in.

        Called only for denoisers in `facts.from_files`.

        Args:
            weights: a file, or the name of one format for all weights.
            config: the denoiser's config.

        Raises:
            BadInputError: there is no such format.
            ModelFolderError: the file cannot be used.
        """
        ...

    def skeleton(self, architecture: Architecture, component: str) -> nn.Module:
        """Return a component without weights, on the default device, which is meta when memory is predicted."""
        ...

    def full_precision_components(self, architecture: Architecture, *, decoding: bool) -> frozenset[str]:
        """Return the components that the model's config wants in fp32 whatever the plan's precision.

        `decoding` asks for the decode stage, else for the stages before it.
        """
        ...

    def encode_workloads(
        self, architecture: Architecture, size: VideoSize, guidance: bool, tiling: TilingSettings
    ) -> tuple[Workload, ...]:
        """Return the work of the encode stage, component by component."""
        ...

    def denoise_workload(self, architecture: Architecture, size: VideoSize, branches: int) -> Workload:
        """Return one pass of a denoiser, which is the same for each of several."""
        ...

    def decode_workload(self, size: VideoSize, tiling: TilingSettings) -> Workload:
        """Return the decode of one chunk of frames."""
        ...

    def decode_chunk_sizes(self, size: VideoSize, max_useful: int) -> Sequence[int]:
        """Return how many frames may be decoded at a time without changing the result, from many to few.

        More than `max_useful` would save no time. A decoder with temporal layers over all frames has one such number.
        """
        ...

    def supports_tiling(self, architecture: Architecture) -> bool:
        """Whether the autoencoder can run in tiles, with the result of untiled frames."""
        ...

    def encode(
        self,
        model: I2VModel,
        prompt: Prompt,
        size: VideoSize,
        guidance: bool,
        tiling: TilingSettings,
        place: Place,
        on_chunk: Callable[[], None],
    ) -> Conditioning:
        """Encode a prompt; `tiling` is for the autoencoder, which encodes the picture."""
        ...

    def denoise(self, denoiser: nn.Module, latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
        """Return the denoiser's prediction (B, C, T, H, W), of noise or whatever else the scheduler expects."""
        ...

    def guidance_scale(self, cfg: float, latent_frames: int) -> float | Tensor:
        """Return the guidance scale: one number, or one for each frame (1, 1, T, 1, 1)."""
        ...

    def inputs_for_frames(self, inputs: TensorMap, frames: Tensor) -> TensorMap:
        """Return a branch's inputs for a denoiser that gets only a window of the clip's latent frames.

        `frames` (t,) are the frames' indices in rising order, `facts.anchor_frames` first. An input that encodes a
        frame's position in the clip must keep that position.
        """
        ...

    def chunked(
        self, denoiser: nn.Module, settings: ChunkSettings, *, runner: LayerRunner, on_chunk: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """Make the denoiser run chunked within the context, with the same result.

        `on_chunk` is called at least once for each chunk.
        """
        ...

    def latents_to_host(self, architecture: Architecture, latents_BCTHW: Tensor, inputs: TensorMap) -> Tensor:
        """Return the sampler's latents as the host's LATENT: unscaled, and with frames on the batch axis for an image
        VAE.

        `inputs` are the positive branch's, on the CPU, since some families put one of them into the result.
        """
        ...

    def decoded_frames(self, samples: Tensor) -> int:
        """Return how many frames the host's LATENT samples decode to."""
        ...

    def decode(
        self,
        decoder: Placed,
        samples: Tensor,
        first_frame: int,
        tiling: TilingSettings,
        on_chunk: Callable[[], None],
    ) -> Iterator[Tensor]:
        """Yield chunks of frames (f, H, W, 3) in 0…1, in fp32, in host memory, in order from `first_frame` on.

        An image autoencoder can start at any frame. A causal one decodes the frames before again, to fill its cache,
        but does not yield them.
        """
        ...
