"""The real configuration of the model that a loader's file name tells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from comfy_host.model_case import ModelCase

from benchmarks.native_models import NamedCase, real_models

from .clips import Clip
from .host import host_module


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Files of a model that core runs by one of its classes."""

    file: str
    """Pattern of their names, in small letters."""
    supported_model: str
    """Core's class, by which the configuration is found among `benchmarks/native_models`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Values that the configuration must have; None: it must lack them."""
    title: str = ""
    """Part of the case's name, where one configuration has cases of several inputs."""

    def has(self, named: NamedCase) -> bool:
        title, _, case = named
        if case.supported_model != self.supported_model or self.title not in title:
            return False
        return all(case.config.get(name) == value for name, value in self.facts.items())


_WAN_14B, _WAN_1_3B = {"dim": 5120}, {"dim": 1536}
_WITH_IMAGE, _TEXT_ALONE, _CONTROLLED = ({**_WAN_14B, "in_dim": it} for it in (36, 16, 52))
FAMILIES = (
    Family(file=r"wan2\.2_(i2v|fun_inpaint)_.*14b", supported_model="WAN21_T2V", facts=_WITH_IMAGE),
    Family(file=r"wan2\.[12]_t2v_.*14b", supported_model="WAN21_T2V", facts=_TEXT_ALONE, title="T2V"),
    Family(file=r"wan2\.2_fun_control_.*14b", supported_model="WAN21_T2V", facts=_CONTROLLED),
    Family(file=r"wan2\.2_fun_camera_.*14b", supported_model="WAN22_Camera", facts=_WAN_14B),
    Family(file=r"wan2\.2_bernini", supported_model="WAN21_T2V", facts=_TEXT_ALONE, title="Bernini"),
    Family(file=r"wan2\.2_s2v_14b", supported_model="WAN22_S2V"),
    Family(file=r"wan2\.2_animate_14b", supported_model="WAN22_Animate"),
    Family(file=r"wan2\.2_dancer_14b", supported_model="WAN22_WanDancer"),
    Family(file=r"wan2\.1_14b_scail_2", supported_model="WAN21_SCAIL2"),
    Family(file=r"humo_17b", supported_model="WAN21_HuMo"),
    Family(file=r"wan2\.1_(i2v|flf2v)_.*14b|wan2_1-i2v-|wan21-wanmove", supported_model="WAN21_I2V", facts=_WAN_14B),
    Family(file=r"wan2\.1_vace_14b", supported_model="WAN21_Vace", facts=_WAN_14B),
    Family(file=r"wan2\.1_t2v_1\.3b", supported_model="WAN21_T2V", facts=_WAN_1_3B),
    Family(file=r"wan2\.1_fun_inp_1\.3b", supported_model="WAN21_I2V", facts=_WAN_1_3B),
    Family(file=r"wan2\.1_fun_control_1\.3b", supported_model="WAN21_FunControl2V", facts=_WAN_1_3B),
    Family(file=r"wan2\.2_ti2v_5b", supported_model="WAN22_T2V"),
    Family(file=r"ltx-2\.3-", supported_model="LTXAV", facts={"cross_attention_adaln": True}),
    Family(file=r"ltx-2-19b", supported_model="LTXAV", facts={"cross_attention_adaln": None}),
    Family(file=r"ltx-video-2b", supported_model="LTXV", facts={"num_layers": 28}),
    Family(file=r"ltx-video-13b|ltxv-13b", supported_model="LTXV", facts={"num_layers": 48}),
    Family(file=r"minimax_h3_ref2va", supported_model="MiniMaxH3", title="references"),
    Family(file=r"minimax_h3_fl2va", supported_model="MiniMaxH3"),
    Family(file=r"hunyuanvideo1\.5_", supported_model="HunyuanVideo15"),
    Family(file=r"hunyuan_video_t2v", supported_model="HunyuanVideo"),
    Family(file=r"hunyuan_video_.*i2v", supported_model="HunyuanVideoI2V"),
    Family(file=r"kandinsky5lite_", supported_model="Kandinsky5", facts={"model_dim": 1792}),
    Family(file=r"kandinsky5pro_", supported_model="Kandinsky5", facts={"model_dim": 4096}),
    Family(file=r"cogvideox.*i2v", supported_model="CogVideoX_I2V"),
)

_FORMATS = ("fp8", "int8")
"""Formats of a byte a weight, by which a file's name tells them; other files are in 16 bits."""

_STREAMS = {"LTXAV": (2, 25.0, 25.0), "MiniMaxH3": (3, 40.0, 24.0)}
"""Audio latents that go with the video's: the axis of time, steps a second, and the clip's frames a second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model with a real configuration."""

    name: str
    case: ModelCase
    case_clip: Clip
    """The clip of the case's latent."""
    stored: str
    """How the file holds weights."""

    def at(self, clip: Clip) -> ModelCase:
        """The case with the latent of another clip."""
        batch, channels, frames, height, _ = self.case.latent_shape
        spatial, temporal = self.case_clip.height // height, max(1, (self.case_clip.frames - 1) // max(1, frames - 1))
        latent_frames = (clip.frames - 1) // temporal + 1
        if self.case.supported_model == "MiniMaxH3":  # its frames come in groups of 17, after 5
            latent_frames = max(0, -(-(clip.frames - 5) // 17)) * 5 + 2
        shape = (batch, channels, latent_frames, clip.height // spatial, clip.width // spatial)
        frames = clip.frames if self.case.supported_model == "MiniMaxH3" else (latent_frames - 1) * temporal + 1
        return replace(self.case, latent_shape=shape, audio_latent_shape=self._audio(frames))

    def _audio(self, frames: int) -> tuple[int, ...] | None:
        """Shape of the audio latent that is as long as some frames."""
        stream, shape = _STREAMS.get(self.case.supported_model), self.case.audio_latent_shape
        if stream is None or shape is None:
            return shape
        axis, steps_per_second, frames_per_second = stream
        return (*shape[:axis], round(frames / frames_per_second * steps_per_second), *shape[axis + 1 :])


def known_model(file: str) -> KnownModel | None:
    """The model in a file; None where `benchmarks/native_models` has no configuration for it."""
    name = file.rpartition("/")[2].lower()
    families = [family for family in FAMILIES if re.search(family.file, name)]
    cases: list[NamedCase] = real_models() if families else []
    found = next((case for case in cases for family in families if family.has(case)), None)
    if found is None or not hasattr(host_module("comfy.supported_models"), found[2].supported_model):
        return None
    title, size, case = found
    stored = next((it for it in _FORMATS if it in name), "16 bits")
    return KnownModel(name=title, case=case, case_clip=Clip(*map(int, size.split("×"))), stored=stored)
