"""Every number of the training, in one place.

The picture is small (96×96, 12×12 latents) because two CPU cores must train and run it.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSettings:
    """size in pixels; travel is the way a moving shape goes in a whole clip, as a fraction of the picture."""

    size: int = 96
    frames: int = 16
    travel: float = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeSettings:
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
    """tokens is short on purpose: the text shares its cross-attention with 68 image tokens."""

    tokens: int = 20
    width: int = 64
    layers: int = 3
    heads: int = 4
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionSettings:
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
    """A set of drawn and encoded groups.

    pairs is the share of pictures with two shapes, hues the share of those whose shapes may have any colour.
    """

    name: str
    groups: int
    pairs: float
    frames: int
    hues: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Helping:
    """What one step is fed: every how-manieth frame, of how many groups, in how many of the four directions."""

    stride: int
    groups: int
    ways: int = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One stretch of the denoiser's training; each step draws one of the helpings.

    The learning rate falls to near zero in a cooling phase and holds in the others; it starts at the given share.
    """

    name: str
    drawing: Drawing
    helpings: tuple[Helping, ...]
    steps: int
    cooling: bool = False
    share: float = 1.0


ONE_SHAPE = Drawing(name="one", groups=700, pairs=0.0, frames=4)
MIXED = Drawing(name="mixed", groups=1500, pairs=0.6, frames=16)
PAIRS = Drawing(name="pairs", groups=2500, pairs=0.7, frames=16)
# From six colours alone the denoiser learns which shapes have which, and not to take a colour from the picture.
HUES = Drawing(name="hues", groups=1900, pairs=0.7, frames=16, hues=0.5)
# Six frames of two pictures teach more a second than sixteen of one, but sixteen are what is asked for.
BOTH = (Helping(stride=3, groups=2), Helping(stride=1, groups=1))
# Once the prompt is followed, more pictures in a step are worth more than all four directions of one.
WIDE = (Helping(stride=1, groups=2, ways=2), Helping(stride=1, groups=2, ways=2), Helping(stride=3, groups=4, ways=2))


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserSettings:
    """Attention only at 6×6: at 12×12 it would take three quarters of a step's time."""

    channels: tuple[int, ...] = (64, 96)
    down_blocks: tuple[str, ...] = ("DownBlock3D", "CrossAttnDownBlock3D")
    up_blocks: tuple[str, ...] = ("CrossAttnUpBlock3D", "UpBlock3D")
    head_width: int = 16
    groups: int = 8
    learning_rate: float = 2e-3
    average: float = 0.995
    drop: float = 0.1
    stand: float = 0.15
    phases: tuple[Phase, ...] = (
        Phase(name="one", drawing=ONE_SHAPE, steps=1200, helpings=(Helping(stride=1, groups=2),)),
        Phase(name="two", drawing=MIXED, steps=500, helpings=BOTH),
        Phase(name="cool", drawing=MIXED, steps=1200, helpings=WIDE, cooling=True),
        Phase(name="more", drawing=PAIRS, steps=1300, helpings=WIDE, share=0.6),
        Phase(name="bind", drawing=PAIRS, steps=2600, helpings=WIDE, share=0.6, cooling=True),
        Phase(name="hues", drawing=HUES, steps=1700, helpings=WIDE, share=0.5, cooling=True),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    seed: int = 0
    clip: ClipSettings = field(default_factory=ClipSettings)
    vae: VaeSettings = field(default_factory=VaeSettings)
    text: TextSettings = field(default_factory=TextSettings)
    vision: VisionSettings = field(default_factory=VisionSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
