"""I2VGen-XL: a 3-D UNet of per-frame and temporal layers, an image autoencoder, CLIP for text and for the picture.

Zhang et al., "I2VGen-XL: High-Quality Image-to-Video Synthesis via Cascaded Diffusion Models", 2023.

Shape legend: B guidance branches, C latent channels, T latent frames (= pixel frames), h/w latent size,
H/W pixel size, F frames in one decode, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chunking import ChunkSettings, LayerRunner, chunked
from ..decoding import TilingSettings
from ..memory.meter import host_memory
from ..placement.offload import empty_on_host
from . import autoencoder_kl, clip
from .base import Conditioning, Place, Placed, Prompt, TensorMap, Workload
from .facts import FamilyFacts, SchedulerChoice, VideoSize
from .folder import ComponentSpec, load_tokenizer
from .model import Architecture, I2VModel
from .pictures import cover, first_picture, to_tensor
from .preview import preview_factors
from .unet_family import DIFFUSERS_STEM, TRANSFORMERS_STEM, UNetFamily

# The text encoder's last layer is skipped: the model was trained on the one before it.
_CLIP_SKIP = 1


class I2VGenXL(UNetFamily):
    """I2VGen-XL; see `base.Family`."""

    facts = FamilyFacts(
        name="i2vgen-xl",
        display_name="I2VGen-XL",
        spatial_compression=8,
        temporal_compression=1,
        anchor_frames=1,  # the picture's latents: the denoiser makes its context of the first frame that it is given
        latent_channels=4,
        size_multiple=8,
        min_side_pixels=64,
        default_size=VideoSize(width_pixels=1280, height_pixels=704, frames=16),
        default_fps=16,
        default_cfg=9.0,
        optional_inputs=frozenset({"text", "negative_text", "fps"}),
        # None of these draws noise during sampling, so a seed always gives the same video.
        schedulers=(
            SchedulerChoice(name="ddim", diffusers_class="DDIMScheduler"),
            SchedulerChoice(name="euler", diffusers_class="EulerDiscreteScheduler"),
            SchedulerChoice(name="dpmpp_2m", diffusers_class="DPMSolverMultistepScheduler"),
            SchedulerChoice(name="unipc", diffusers_class="UniPCMultistepScheduler"),
        ),
        table_sizes=tuple(
            VideoSize(width_pixels=width, height_pixels=height, frames=frames)
            for width, height, frames in ((512, 512, 16), (768, 768, 24), (1280, 704, 16), (1024, 1024, 32))
        ),
    )
    components = (
        ComponentSpec(name="unet", weights_stem=DIFFUSERS_STEM),
        ComponentSpec(name="vae", weights_stem=DIFFUSERS_STEM),
        ComponentSpec(name="text_encoder", weights_stem=TRANSFORMERS_STEM),
        ComponentSpec(name="image_encoder", weights_stem=TRANSFORMERS_STEM),
        ComponentSpec(
            name="tokenizer",
            files=("tokenizer_config.json", "tokenizer.json|vocab.json", "tokenizer.json|merges.txt"),
        ),
        ComponentSpec(name="feature_extractor", files=("preprocessor_config.json",)),
        ComponentSpec(name="scheduler", files=("scheduler_config.json",)),
    )
    pipeline, unet = "I2VGenXLPipeline", "I2VGenXLUNet"

    def module_classes(self) -> Mapping[str, Any]:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
        from transformers import CLIPTextModel, CLIPVisionModelWithProjection

        return {
            "unet": I2VGenXLUNet,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "image_encoder": CLIPVisionModelWithProjection,
        }

    def check_configs(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        scheduler: Any = DDIMScheduler
        clip.VisionInput.from_config(configs["feature_extractor"])
        scheduler.from_config(configs["scheduler"]).set_timesteps(1)
        int(configs["unet"]["cross_attention_dim"])
        tokens = int(configs["tokenizer"]["model_max_length"])
        positions = int(configs["text_encoder"].get("max_position_embeddings", tokens))
        if not 0 < tokens <= positions:
            raise ValueError(f"the tokenizer makes {tokens} tokens, the text encoder takes {positions}")

    def tokenizer(self, folder: Path) -> Any:
        from transformers import CLIPTokenizer

        return load_tokenizer(CLIPTokenizer, folder / "tokenizer")

    def full_precision_components(self, architecture: Architecture, *, decoding: bool) -> frozenset[str]:  # noqa: ARG002
        return frozenset({"vae"} if autoencoder_kl.wants_full_precision(architecture.config("vae")) else ())

    def encode_workloads(
        self, architecture: Architecture, size: VideoSize, guidance: bool, tiling: TilingSettings
    ) -> tuple[Workload, ...]:
        wanted = clip.VisionInput.from_config(architecture.config("feature_extractor"))
        length = _text_length(architecture)

        def text(encoder: Placed) -> Tensor:
            token_ids = torch.zeros(1, length, dtype=torch.long, device=encoder.device)
            return clip.encode_text(encoder.module, token_ids, _CLIP_SKIP)

        def picture(encoder: Placed) -> Tensor:
            shape = (1, 3, wanted.height_pixels, wanted.width_pixels)
            return encoder.module(torch.empty(shape, device=encoder.device, dtype=encoder.dtype)).image_embeds

        def latents(vae: Placed) -> Tensor:
            picture_13HW = empty_on_host((1, 3, size.height_pixels, size.width_pixels), torch.float32, vae.device)
            return self._image_latents(vae, picture_13HW, tiling, on_chunk=lambda: None)

        return (
            Workload(
                name="prompt", component="text_encoder", run=text, passes=2 if guidance else 1, depends_on_size=False
            ),
            Workload(name="picture", component="image_encoder", run=picture, depends_on_size=False),
            Workload(name="latents", component="vae", run=latents, by_layer=tiling.by_layer),
        )

    def denoise_workload(self, architecture: Architecture, size: VideoSize, branches: int) -> Workload:
        _, channels, frames, height, width = self.facts.latent_size(size).shape_bcthw
        text_width = architecture.config("unet")["cross_attention_dim"]
        length = _text_length(architecture)

        def denoise(unet: Placed) -> Tensor:
            def empty(*shape: int) -> Tensor:
                return torch.empty(branches, *shape, device=unet.device, dtype=unet.dtype)

            inputs = {
                "encoder_hidden_states": empty(length, text_width),
                "image_embeddings": empty(1, text_width),
                "image_latents": empty(channels, frames, height, width),
                "fps": torch.empty(branches, device=unet.device),
            }
            latents_BCThw = empty(channels, frames, height, width)
            return self.denoise(unet.module, latents_BCThw, torch.zeros((), device=unet.device), inputs)

        return Workload(name="denoise", component="unet", run=denoise)

    def decode_workload(self, size: VideoSize, tiling: TilingSettings) -> Workload:
        latent = self.facts.latent_size(size)
        frames = min(tiling.chunk_size, size.frames)

        def decode(vae: Placed) -> Tensor:
            shape = (frames, latent.channels, latent.latent_height, latent.latent_width)
            samples = empty_on_host(shape, torch.float32, vae.device)
            return next(self.decode(vae, samples, 0, tiling, on_chunk=lambda: None))

        passes = -(-size.frames // frames)
        return Workload(name="decode", component=self.decoder, run=decode, passes=passes, by_layer=tiling.by_layer)

    def decode_chunk_sizes(self, size: VideoSize, max_useful: int) -> Sequence[int]:
        return autoencoder_kl.chunk_sizes(size.frames, max_useful)

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
            picture = first_picture(prompt.image_FHWC)
            fitted = cover(picture, size.width_pixels, size.height_pixels)
            picture_13HW = to_tensor(fitted)
        with place("text_encoder") as text_encoder:
            text = _encode_text(text_encoder, model.tokenizer, prompt.text)
            negative_text = _encode_text(text_encoder, model.tokenizer, prompt.negative_text) if guidance else None
        with place("image_encoder") as image_encoder:
            # As in the published pipeline, the image encoder gets the centre square at the video's width.
            square = cover(picture, size.width_pixels, size.width_pixels)
            wanted = clip.VisionInput.from_config(model.architecture.config("feature_extractor"))
            embeds = clip.encode_picture(image_encoder, square, wanted).float().cpu()
        with place("vae", by_layer=tiling.by_layer) as vae:
            latents_1Chw = self._image_latents(vae, picture_13HW, tiling, on_chunk).cpu()
        shared = {
            "image_latents": _with_ramp(latents_1Chw, size.frames),
            "fps": torch.tensor([float(prompt.fps)]),
        }
        negative = None
        if negative_text is not None:
            negative = {
                **shared,
                "encoder_hidden_states": negative_text,
                "image_embeddings": torch.zeros_like(embeds),
            }
        return Conditioning(
            family=self.facts.name,
            size=size,
            positive={**shared, "encoder_hidden_states": text, "image_embeddings": embeds},
            negative=negative,
            preview_factors=preview_factors(model.folder, latents_1Chw, fitted),
        )

    def _image_latents(
        self, vae: Placed, picture_13HW: Tensor, tiling: TilingSettings, on_chunk: Callable[[], None]
    ) -> Tensor:
        """Return the scaled latents (1, C, h, w) of a picture in 0…1."""
        mode_1Chw = autoencoder_kl.encode_mode(vae, autoencoder_kl.centred(picture_13HW), tiling, on_chunk)
        return mode_1Chw * vae.module.config.scaling_factor

    def denoise(self, denoiser: nn.Module, latents_BCTHW: Tensor, timestep: Tensor, inputs: TensorMap) -> Tensor:
        return denoiser(latents_BCTHW, timestep, **inputs, return_dict=False)[0]

    def guidance_scale(self, cfg: float, latent_frames: int) -> float | Tensor:  # noqa: ARG002
        return cfg

    def inputs_for_frames(self, inputs: TensorMap, frames: Tensor) -> TensorMap:
        """Return the inputs with the window's planes of the image latents: each frame keeps its plane i / (T − 1)."""
        return {**inputs, "image_latents": inputs["image_latents"][:, :, frames]}

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
        return autoencoder_kl.decode(decoder, samples[first_frame:], tiling, on_chunk)


FAMILY = I2VGenXL()


def _encode_text(text_encoder: Placed, tokenizer: Any, text: str) -> Tensor:
    token_ids = clip.tokenize(tokenizer, text).to(text_encoder.device)
    return clip.encode_text(text_encoder.module, token_ids, _CLIP_SKIP).float().cpu()


def _with_ramp(latents_1Chw: Tensor, frames: int) -> Tensor:
    """Return (1, C, T, h, w): the picture's latents, then constant planes i / (T − 1) that encode the position."""
    planes = [latents_1Chw] + [torch.full_like(latents_1Chw, i / (frames - 1)) for i in range(1, frames)]
    return torch.stack(planes, dim=2)


def _text_length(architecture: Architecture) -> int:
    return int(architecture.config("tokenizer")["model_max_length"])
