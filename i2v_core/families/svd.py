"""Stable Video Diffusion: a UNet of spatial and temporal layers, a decoder with temporal layers, CLIP vision.

Blattmann et al., "Stable Video Diffusion: Scaling Latent Video Diffusion Models to Large Datasets", 2023.

Shape legend: B guidance branches, C latent channels, T latent frames (= pixel frames), h/w latent size,
H/W pixel size, F frames in one decode, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..chunking import ChunkSettings, LayerRunner
from ..chunking.spatio_temporal_unet import chunked
from ..decoding import TilingSettings, decode_clip_into
from ..memory.meter import host_memory
from ..placement.offload import empty_on_host
from . import autoencoder_kl, clip
from .base import Conditioning, Place, Placed, Prompt, TensorMap, Workload
from .facts import FamilyFacts, SchedulerChoice, VideoSize
from .folder import ComponentSpec
from .model import Architecture, I2VModel
from .pictures import cover, first_picture, to_tensor
from .preview import preview_factors
from .unet_family import DIFFUSERS_STEM, TRANSFORMERS_STEM, UNetFamily

# Numbers that the denoiser is conditioned on: frame rate, motion bucket and noise augmentation.
_TIME_IDS = 3
AUGMENTATION_SEED = 0
"""Seed of the noise that is added to the picture, fixed so that a picture always gives the same conditioning."""


class StableVideoDiffusion(UNetFamily):
    """Stable Video Diffusion; see `base.Family`."""

    facts = FamilyFacts(
        name="svd",
        display_name="Stable Video Diffusion",
        spatial_compression=8,
        temporal_compression=1,
        anchor_frames=None,  # the denoiser encodes positions itself, by counting the frames that it is given
        latent_channels=4,
        size_multiple=8,
        min_side_pixels=64,
        default_size=VideoSize(width_pixels=1024, height_pixels=576, frames=25),
        default_fps=7,
        default_cfg=3.0,
        optional_inputs=frozenset({"fps", "motion_bucket", "noise_augmentation"}),
        # The denoiser takes the logarithm of the noise level, up to 700; diffusers' other schedulers pass step numbers.
        schedulers=(SchedulerChoice(name="euler", diffusers_class="EulerDiscreteScheduler"),),
        table_sizes=tuple(
            VideoSize(width_pixels=width, height_pixels=height, frames=frames)
            for width, height, frames in ((1024, 576, 14), (1024, 576, 25), (1280, 720, 25))
        ),
    )
    components = (
        ComponentSpec(name="unet", weights_stem=DIFFUSERS_STEM),
        ComponentSpec(name="vae", weights_stem=DIFFUSERS_STEM),
        ComponentSpec(name="image_encoder", weights_stem=TRANSFORMERS_STEM),
        ComponentSpec(name="feature_extractor", files=("preprocessor_config.json",)),
        ComponentSpec(name="scheduler", files=("scheduler_config.json",)),
    )
    pipeline, unet = "StableVideoDiffusionPipeline", "UNetSpatioTemporalConditionModel"

    def module_classes(self) -> Mapping[str, Any]:
        from diffusers.models.autoencoders.autoencoder_kl_temporal_decoder import AutoencoderKLTemporalDecoder
        from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionModel
        from transformers import CLIPVisionModelWithProjection

        return {
            "unet": UNetSpatioTemporalConditionModel,
            "vae": AutoencoderKLTemporalDecoder,
            "image_encoder": CLIPVisionModelWithProjection,
        }

    def check_configs(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

        scheduler: Any = EulerDiscreteScheduler
        clip.VisionInput.from_config(configs["feature_extractor"])
        scheduler.from_config(configs["scheduler"]).set_timesteps(2)
        unet = configs["unet"]
        int(unet["cross_attention_dim"])
        time_ids = _TIME_IDS * int(unet.get("addition_time_embed_dim", 256))
        expected = int(unet.get("projection_class_embeddings_input_dim", 768))
        if time_ids != expected:
            raise ValueError(
                f"the denoiser takes {expected} values for rate, motion and noise, and would get {time_ids}"
            )

    def full_precision_components(self, architecture: Architecture, *, decoding: bool) -> frozenset[str]:
        """See `base.Family`. As in diffusers, the autoencoder's `force_upcast` concerns its encoder only."""
        wanted = not decoding and autoencoder_kl.wants_full_precision(architecture.config("vae"))
        return frozenset({"vae"} if wanted else ())

    def encode_workloads(
        self,
        architecture: Architecture,
        size: VideoSize,
        guidance: bool,  # noqa: ARG002
        tiling: TilingSettings,
    ) -> tuple[Workload, ...]:
        wanted = clip.VisionInput.from_config(architecture.config("feature_extractor"))

        def picture(encoder: Placed) -> Tensor:
            shape = (1, 3, wanted.height_pixels, wanted.width_pixels)
            return encoder.module(torch.empty(shape, device=encoder.device, dtype=encoder.dtype)).image_embeds

        def latents(vae: Placed) -> Tensor:
            picture_13HW = empty_on_host((1, 3, size.height_pixels, size.width_pixels), torch.float32, vae.device)
            return autoencoder_kl.encode_mode(vae, picture_13HW, tiling, on_chunk=lambda: None)

        return (
            Workload(name="picture", component="image_encoder", run=picture, depends_on_size=False),
            Workload(name="latents", component="vae", run=latents, by_layer=tiling.by_layer),
        )

    def denoise_workload(self, architecture: Architecture, size: VideoSize, branches: int) -> Workload:
        _, channels, frames, height, width = self.facts.latent_size(size).shape_bcthw
        context_width = architecture.config("unet")["cross_attention_dim"]

        def denoise(unet: Placed) -> Tensor:
            def empty(*shape: int) -> Tensor:
                return torch.empty(branches, *shape, device=unet.device, dtype=unet.dtype)

            inputs = {
                "encoder_hidden_states": empty(1, context_width),
                "image_latents": empty(channels, 1, height, width),
                "added_time_ids": empty(_TIME_IDS),
            }
            latents_BCThw = empty(channels, frames, height, width)
            return self.denoise(unet.module, latents_BCThw, torch.zeros((), device=unet.device), inputs)

        return Workload(name="denoise", component="unet", run=denoise)

    def decode_workload(self, size: VideoSize, tiling: TilingSettings) -> Workload:
        latent = self.facts.latent_size(size)

        def decode(vae: Placed) -> Tensor:
            shape = (size.frames, latent.channels, latent.latent_height, latent.latent_width)
            samples = empty_on_host(shape, torch.float32, vae.device)
            return next(self.decode(vae, samples, 0, tiling, on_chunk=lambda: None))

        return Workload(name="decode", component=self.decoder, run=decode, by_layer=tiling.by_layer)

    def decode_chunk_sizes(self, size: VideoSize, max_useful: int) -> Sequence[int]:  # noqa: ARG002
        """Return the number of all frames, since every block of the decoder has temporal layers."""
        return (size.frames,)

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
            centred_13HW = autoencoder_kl.centred(to_tensor(fitted))
            noisy_13HW = centred_13HW + prompt.noise_augmentation * _noise_like(centred_13HW)
        with place("image_encoder") as image_encoder:
            wanted = clip.VisionInput.from_config(model.architecture.config("feature_extractor"))
            embeds = clip.encode_antialiased(image_encoder, centred_13HW, wanted).float().cpu()
        with place("vae", by_layer=tiling.by_layer) as vae:
            latents_1Chw = autoencoder_kl.encode_mode(vae, noisy_13HW, tiling, on_chunk).cpu()
        # The model was trained with the frame rate less one.
        time_ids = [float(prompt.fps - 1), float(prompt.motion_bucket), prompt.noise_augmentation]
        positive = {
            "encoder_hidden_states": embeds,
            "image_latents": latents_1Chw[:, :, None],
            "added_time_ids": torch.tensor([time_ids]),
        }
        blank = {name: torch.zeros_like(positive[name]) for name in ("encoder_hidden_states", "image_latents")}
        return Conditioning(
            family=self.facts.name,
            size=size,
            positive=positive,
            negative={**positive, **blank} if guidance else None,
            preview_factors=preview_factors(
                model.folder, latents_1Chw * autoencoder_kl.scaling_factor(model.architecture.config("vae")), fitted
            ),
        )

    def denoise(self, denoiser: nn.Module, latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
        latents_BTCHW = latents_BCTHW.transpose(1, 2)
        picture_BTCHW = inputs["image_latents"].transpose(1, 2).expand_as(latents_BTCHW)
        prediction_BTCHW = denoiser(
            torch.cat([latents_BTCHW, picture_BTCHW], dim=2),
            timestep,
            inputs["encoder_hidden_states"],
            inputs["added_time_ids"],
            return_dict=False,
        )[0]
        return prediction_BTCHW.transpose(1, 2)

    def guidance_scale(self, cfg: float, latent_frames: int) -> float | Tensor:
        """Return a scale that rises from 1 in the first frame, which is the picture, to `cfg` in the last."""
        return torch.linspace(1.0, cfg, latent_frames).view(1, 1, -1, 1, 1) if latent_frames > 1 else cfg

    def inputs_for_frames(self, inputs: TensorMap, frames: Tensor) -> TensorMap:
        raise NotImplementedError("the denoiser needs all frames of the clip")

    def chunked(
        self, denoiser: nn.Module, settings: ChunkSettings, *, runner: LayerRunner, on_chunk: Callable[[], None]
    ) -> AbstractContextManager[None]:
        return chunked(denoiser, settings, runner=runner, on_chunk=on_chunk)

    def decode(
        self,
        decoder: Placed,
        samples: Tensor,
        first_frame: int,
        tiling: TilingSettings,
        on_chunk: Callable[[], None],
    ) -> Iterator[Tensor]:
        on_chunk()
        vae = decoder.module
        on_device_FChw = samples.to(decoder.device, decoder.dtype)
        compression = self.facts.spatial_compression
        height, width = (side * compression for side in samples.shape[2:])
        frames_FHW3 = empty_on_host((len(samples), height, width, 3), torch.float32, decoder.device)
        if tiling.by_layer:
            decode_clip_into(vae, on_device_FChw, frames_FHW3, tiling, runner=decoder.runner, on_chunk=on_chunk)
        else:
            decoded_F3HW = vae.decode(on_device_FChw, num_frames=len(samples)).sample
            frames_FHW3.copy_(decoded_F3HW.permute(0, 2, 3, 1))
        yield frames_FHW3[first_frame:].mul_(0.5).add_(0.5).clamp_(0, 1)


FAMILY = StableVideoDiffusion()


def _noise_like(picture_13HW: Tensor) -> Tensor:
    """Return standard normal noise, drawn on the CPU so that it is the same on any device."""
    return torch.randn(picture_13HW.shape, generator=torch.Generator("cpu").manual_seed(AUGMENTATION_SEED))
