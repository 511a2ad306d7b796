"""Wan image-to-video: a transformer over all tokens of the clip, a causal video autoencoder, UMT5 for text.

Wan et al., "Wan: Open and Advanced Large-Scale Video Generative Models", 2025. Wan 2.1 I2V 14B also gets the
picture's CLIP states; Wan 2.2 I2V A14B does not, and has two experts, for the noisy steps and for the others. One
guidance scale is used for both.

Shape legend: B guidance branches, C latent channels, T latent frames, h/w latent size, H/W pixel size, F frames in one
decode, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...chunking import ChunkSettings, LayerRunner
from ...decoding import TilingSettings
from ...errors import ModelFolderError
from ...memory.meter import host_memory
from ...placement.offload import empty_on_host, fp32_host_copy
from ..autoencoder_kl import centred
from ..base import Conditioning, Denoiser, Place, Placed, Prompt, TensorMap, Workload
from ..facts import FamilyFacts, SchedulerChoice, VideoSize
from ..folder import pipeline_class, read_json
from ..model import NO_FILES, Architecture, I2VModel, WeightFiles
from ..pictures import cover, first_picture, to_tensor
from ..preview import preview_factors
from . import umt5, weight_file
from .autoencoder import WanAutoencoder
from .folder import load_folder, make_skeleton, quantized_weight_names, read_configs, vision_pixels
from .latents import denormalised, normalised
from .transformer import chunked_wan

TEXT_TOKENS = 512

# Latent frames after which memory no longer changes from one pass of the autoencoder to the next.
_STEADY_FRAMES = 3

SCHEDULERS = (
    SchedulerChoice(
        name="unipc",
        diffusers_class="UniPCMultistepScheduler",
        renamed=(("shift", "flow_shift"),),
        changes=(("prediction_type", "flow_prediction"), ("use_flow_sigmas", True)),
    ),
    SchedulerChoice(
        name="euler", diffusers_class="FlowMatchEulerDiscreteScheduler", renamed=(("flow_shift", "shift"),)
    ),
)


class Wan:
    """Wan 2.1 I2V 14B and Wan 2.2 I2V A14B; see `base.Family`."""

    facts = FamilyFacts(
        name="wan",
        display_name="Wan I2V 14B",
        spatial_compression=8,
        temporal_compression=4,
        anchor_frames=None,  # the denoiser encodes positions itself, by counting the frames that it is given
        latent_channels=16,
        size_multiple=16,
        min_side_pixels=64,
        default_size=VideoSize(width_pixels=832, height_pixels=480, frames=81),
        default_fps=16,
        default_cfg=5.0,
        optional_inputs=frozenset({"text", "negative_text"}),
        schedulers=SCHEDULERS,
        has_skips=False,
        fp16_unsafe=frozenset({"text_encoder"}),
        from_files=frozenset({"transformer", "transformer_2"}),
        table_sizes=tuple(
            VideoSize(width_pixels=width, height_pixels=height, frames=81)
            for width, height in ((832, 480), (1280, 720))
        ),
    )
    decoder = "vae"

    def denoisers(self, architecture: Architecture) -> tuple[Denoiser, ...]:
        boundary = architecture.config("pipeline").get("boundary_ratio")
        if boundary is None:
            return (Denoiser(component="transformer"),)
        from_timestep = float(boundary) * float(architecture.config("scheduler").get("num_train_timesteps", 1000))
        return (
            Denoiser(component="transformer", from_timestep=from_timestep),
            Denoiser(component="transformer_2"),
        )

    def recognises(self, folder: Path) -> bool:
        if pipeline_class(folder) != "WanImageToVideoPipeline":
            return False
        return not read_json(folder / "model_index.json").get("expand_timesteps")

    def architecture(self, folder: Path, files: WeightFiles = NO_FILES) -> Architecture:
        configs = read_configs(folder)
        architecture = Architecture.from_configs(self.facts.name, configs)
        channels = architecture.config("vae").get("z_dim", 16)
        if channels != self.facts.latent_channels:
            raise ModelFolderError(
                f"the autoencoder in {folder} has {channels} latent channels, not {self.facts.latent_channels}",
                f"use the published folder of {self.facts.display_name}",
            )
        return architecture.with_stored(quantized_weight_names(folder, configs, files))

    def load(self, folder: Path, files: WeightFiles = NO_FILES) -> I2VModel:
        return load_folder(folder, self.architecture(folder, files), files)

    def stored_weights(self, weights: str, config: Mapping[str, Any]) -> dict[str, list[str]]:
        return weight_file.weights_by_format(weights, config)

    def skeleton(self, architecture: Architecture, component: str) -> nn.Module:
        return make_skeleton(architecture, component)

    def full_precision_components(self, architecture: Architecture, *, decoding: bool) -> frozenset[str]:  # noqa: ARG002
        return frozenset()

    def encode_workloads(
        self, architecture: Architecture, size: VideoSize, guidance: bool, tiling: TilingSettings
    ) -> tuple[Workload, ...]:
        def text(encoder: Placed) -> Tensor:
            return umt5.trace_text(encoder, TEXT_TOKENS)

        def picture(encoder: Placed) -> Tensor:
            side = int(architecture.config("image_encoder")["image_size"])
            pixels_13HW = torch.empty(1, 3, side, side, device=encoder.device, dtype=encoder.dtype)
            return encoder.module(pixels_13HW, output_hidden_states=True).hidden_states[-2]

        def latents(vae: Placed) -> Tensor:
            picture_13HW = empty_on_host((1, 3, size.height_pixels, size.width_pixels), torch.float32, vae.device)
            frames = min(self._encoded_frames(size), self.facts.pixel_frames(_STEADY_FRAMES))
            return _wan_autoencoder(vae, tiling, on_chunk=lambda: None).encode_mode(picture_13HW, frames)

        vision_workload = Workload(name="picture", component="image_encoder", run=picture, depends_on_size=False)
        return (
            Workload(
                name="prompt",
                component="text_encoder",
                run=text,
                passes=2 if guidance else 1,
                depends_on_size=False,
                read_in_place=umt5.EMBEDDINGS,
            ),
            *((vision_workload,) if _takes_clip_states(architecture) else ()),
            Workload(
                name="latents",
                component="vae",
                run=latents,
                passes=self.facts.latent_size(size).latent_frames,
                by_layer=tiling.by_layer,
            ),
        )

    def denoise_workload(self, architecture: Architecture, size: VideoSize, branches: int) -> Workload:
        config = architecture.config("transformer")

        def denoise(transformer: Placed) -> Tensor:
            def empty(*shape: int) -> Tensor:
                return torch.empty(branches, *shape, device=transformer.device, dtype=transformer.dtype)

            latents_BCThw = empty(*self.facts.latent_size(size).shape_bcthw[1:])
            inputs = {
                "encoder_hidden_states": empty(TEXT_TOKENS, int(config["text_dim"])),
                **self._empty_condition(latents_BCThw),
            }
            if _takes_clip_states(architecture):
                vision = architecture.config("image_encoder")
                tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1
                inputs["encoder_hidden_states_image"] = empty(tokens, int(config["image_dim"]))
            timestep = torch.zeros((), device=transformer.device)
            return self.denoise(transformer.module, latents_BCThw, timestep, inputs)

        return Workload(name="denoise", component="transformer", run=denoise)

    def decode_workload(self, size: VideoSize, tiling: TilingSettings) -> Workload:
        _, channels, count, height, width = self.facts.latent_size(size).shape_bcthw

        def decode(vae: Placed) -> None:
            shape = (1, channels, min(count, _STEADY_FRAMES), height, width)
            samples_1CThw = empty_on_host(shape, torch.float32, vae.device)
            for _ in self.decode(vae, samples_1CThw, 0, tiling, on_chunk=lambda: None):
                pass

        return Workload(name="decode", component=self.decoder, run=decode, passes=count, by_layer=tiling.by_layer)

    def decode_chunk_sizes(self, size: VideoSize, max_useful: int) -> Sequence[int]:  # noqa: ARG002
        return (self.facts.temporal_compression,)

    def supports_tiling(self, architecture: Architecture) -> bool:  # noqa: ARG002
        return True

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
        with host_memory():
            fitted = cover(first_picture(prompt.image_FHWC), size.width_pixels, size.height_pixels)
            picture_13HW = centred(to_tensor(fitted))
        with place("text_encoder") as encoder:
            text = umt5.encode_text(encoder, model.tokenizer, prompt.text, TEXT_TOKENS)
            negative = (
                umt5.encode_text(encoder, model.tokenizer, prompt.negative_text, TEXT_TOKENS) if guidance else None
            )
        shared: dict[str, Tensor] = {}
        if _takes_clip_states(model.architecture):
            with place("image_encoder") as encoder:
                with host_memory():
                    pixels_13HW = vision_pixels(model.architecture, fitted)
                shared["encoder_hidden_states_image"] = _vision_states(encoder, pixels_13HW)
        with place("vae", by_layer=tiling.by_layer) as vae:
            mode_1CThw = _wan_autoencoder(vae, tiling, on_chunk).encode_mode(picture_13HW, self._encoded_frames(size))
        with host_memory():
            latents_1CThw = normalised(model.architecture, mode_1CThw)
            shared |= self._condition(latents_1CThw)
            factors = preview_factors(model.folder, latents_1CThw[:, :, 0], fitted)
        return Conditioning(
            family=self.facts.name,
            size=size,
            positive={**shared, "encoder_hidden_states": text},
            negative=None if negative is None else {**shared, "encoder_hidden_states": negative},
            preview_factors=factors,
        )

    def _encoded_frames(self, size: VideoSize) -> int:
        """Return the frames that are encoded: the picture, and grey frames for the rest of the video."""
        return size.frames

    def _condition(self, latents_1CThw: Tensor) -> dict[str, Tensor]:
        """Return the denoiser's inputs made of the encoded video: a mask of given frames, and the latents.

        The mask has a channel for each frame that a latent frame decodes to.
        """
        given_14Thw = torch.zeros_like(latents_1CThw[:, : self.facts.temporal_compression])
        given_14Thw[:, :, 0] = 1
        return {"condition": torch.cat([given_14Thw, latents_1CThw], dim=1)}

    def _empty_condition(self, latents_BCThw: Tensor) -> dict[str, Tensor]:
        """Return inputs of `_condition`'s shapes for such latents, with undefined values."""
        batch, channels, *sizes = latents_BCThw.shape
        return {"condition": latents_BCThw.new_empty(batch, self.facts.temporal_compression + channels, *sizes)}

    def denoise(self, denoiser: nn.Module, latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
        other_inputs = {name: tensor for name, tensor in inputs.items() if name != "condition"}
        model_input = torch.cat([latents_BCTHW, inputs["condition"]], dim=1)
        step_B = timestep.to(latents_BCTHW.device).expand(len(latents_BCTHW))
        return denoiser(model_input, step_B, **other_inputs, return_dict=False)[0]

    def guidance_scale(self, cfg: float, latent_frames: int) -> float | Tensor:  # noqa: ARG002
        return cfg

    def inputs_for_frames(self, inputs: TensorMap, frames: Tensor) -> TensorMap:  # noqa: ARG002
        raise AssertionError("the denoiser needs all frames of the clip")

    def chunked(
        self, denoiser: nn.Module, settings: ChunkSettings, *, runner: LayerRunner, on_chunk: Callable[[], None]
    ) -> AbstractContextManager[None]:
        return chunked_wan(denoiser, settings, runner=runner, on_chunk=on_chunk)

    def latents_to_host(self, architecture: Architecture, latents_BCTHW: Tensor, inputs: TensorMap) -> Tensor:  # noqa: ARG002
        return denormalised(architecture, latents_BCTHW)

    def decoded_frames(self, samples: Tensor) -> int:
        return self.facts.pixel_frames(samples.shape[2])

    def decode(
        self,
        decoder: Placed,
        samples: Tensor,
        first_frame: int,
        tiling: TilingSettings,
        on_chunk: Callable[[], None],
    ) -> Iterator[Tensor]:
        for frames_FHW3 in _wan_autoencoder(decoder, tiling, on_chunk).decode(samples, first_frame):
            yield frames_FHW3.mul_(0.5).add_(0.5).clamp_(0, 1)


def _wan_autoencoder(vae: Placed, tiling: TilingSettings, on_chunk: Callable[[], None]) -> WanAutoencoder:
    return WanAutoencoder(
        vae=vae.module, device=vae.device, dtype=vae.dtype, tiling=tiling, runner=vae.runner, on_chunk=on_chunk
    )


def _takes_clip_states(architecture: Architecture) -> bool:
    """Whether the denoiser takes the picture's CLIP states."""
    return architecture.config("transformer").get("image_dim") is not None


def _vision_states(encoder: Placed, pixels_13HW: Tensor) -> Tensor:
    """Return hidden states (1, L, D) of the vision encoder's last layer but one, in fp32, on the CPU."""
    on_device = torch.empty_like(pixels_13HW, device=encoder.device, dtype=encoder.dtype).copy_(pixels_13HW)
    return fp32_host_copy(encoder.module(on_device, output_hidden_states=True).hidden_states[-2])
