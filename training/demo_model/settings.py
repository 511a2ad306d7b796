"""Every number of the training, in one place.

The picture is small (96×96, 12×12 latents) because two CPU cores must train and run it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSettings:
    """Size of a clip."""

    size: int = 96
    """Width and height in pixels."""

    frames: int = 16

    travel: float = 0.25
    """Distance that a moving shape covers in a whole clip, as a fraction of the picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSettings:
    """The picture codec and its training."""

    channels: tuple[int, ...] = (16, 32, 64, 96)
    groups: int = 8
    latent_channels: int = 4
    steps: int = 2400
    batch: int = 8
    pool: int = 5000
    learning_rate: float = 2e-3
    kl_weight: float = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSettings:
    """The text encoder and its training."""

    tokens: int = 20
    """Short on purpose: the text shares its cross-attention with 68 image tokens."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSettings:
    """The vision encoder and its training."""

    size: int = 48
    patch: int = 8
    width: int = 64
    layers: int = 2
    heads: int = 4
    steps: int = 500
    batch: int = 64
    pool: int = 3000
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A set of drawn and encoded groups."""

    name: str
    groups: int

    pairs: float
    """Share of pictures with two shapes."""

    frames: int

    hues: float = 0.0
    """Share of pictures whose shapes may have any colour."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchMakeup:
    """Composition of a training batch."""

    stride: int
    """Every how many frames one is used."""

    groups: int

    ways: int = 4
    """Clips of each group, out of four."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One phase of the denoiser's training."""

    name: str
    drawing: Drawing

    makeups: tuple[BatchMakeup, ...]
    """Each step draws one of these."""

    steps: int

    cooling: bool = False
    """The learning rate falls to near zero; otherwise it stays constant."""

    share: float = 1.0
    """Factor on the learning rate."""


ONE_SHAPE = Drawing(name="one", groups=700, pairs=0.0, frames=4)
MIXED = Drawing(name="mixed", groups=1500, pairs=0.6, frames=16)
PAIRS = Drawing(name="pairs", groups=2500, pairs=0.7, frames=16)
# With six colours alone the denoiser memorises them, and does not learn to take a colour from the picture.
HUES = Drawing(name="hues", groups=1900, pairs=0.7, frames=16, hues=0.5)
# Six frames of two pictures teach more per second than sixteen of one, but clips of sixteen are what users ask for.
BOTH = (BatchMakeup(stride=3, groups=2), BatchMakeup(stride=1, groups=1))
# Once the model follows prompts, more pictures in a step teach more than all four directions of one.
WIDE = (
    BatchMakeup(stride=1, groups=2, ways=2),
    BatchMakeup(stride=1, groups=2, ways=2),
    BatchMakeup(stride=3, groups=4, ways=2),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserSettings:
    """The denoiser and its training.

    Attention runs only at 6×6: at 12×12 it would take three quarters of a step's time.
    """

    channels: tuple[int, ...] = (64, 96)
    down_blocks: tuple[str, ...] = ("DownBlock3D", "CrossAttnDownBlock3D")
    up_blocks: tuple[str, ...] = ("CrossAttnUpBlock3D", "UpBlock3D")
    head_width: int = 16
    groups: int = 8
    learning_rate: float = 2e-3

    average: float = 0.995
    """Decay of the running average of the weights."""

    drop: float = 0.1
    """Share of groups without prompt and picture embedding, for classifier-free guidance."""

    stand: float = 0.15
    """Share of groups of which one clip stands still."""

    phases: tuple[Phase, ...] = (
        Phase(name="one", drawing=ONE_SHAPE, steps=1200, makeups=(BatchMakeup(stride=1, groups=2),)),
        Phase(name="two", drawing=MIXED, steps=500, makeups=BOTH),
        Phase(name="cool", drawing=MIXED, steps=1200, makeups=WIDE, cooling=True),
        Phase(name="more", drawing=PAIRS, steps=1300, makeups=WIDE, share=0.6),
        Phase(name="bind", drawing=PAIRS, steps=2600, makeups=WIDE, share=0.6, cooling=True),
        Phase(name="hues", drawing=HUES, steps=1700, makeups=WIDE, share=0.5, cooling=True),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings of the training."""

    seed: int = 0
    clip: ClipSettings = field(default_factory=ClipSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    text: TextSettings = field(default_factory=TextSettings)
    vision: VisionSettings = field(default_factory=VisionSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
