"""The Stable Video Diffusion test subject."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from i2v_core.chunking import spatio_temporal_unet
from i2v_core.families import I2VModel, Prompt, VideoSize, family_of
from i2v_core.families.svd import AUGMENTATION_SEED
from i2v_core.sampling.noise import initial_noise
from i2v_core.sampling.schedulers import make_scheduler

from .parts import as_picture, clip_processor, preprocessor
from .subject import DenoiserSubject, Inputs, LatentShape, Noise, Subject


def save_tiny_svd(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any) -> None:
    """Save a Stable Video Diffusion of random weights in diffusers layout; `save` goes to every `save_pretrained`."""
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    width = 32
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        cross_attention_dim=width,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    autoencoder: Any = AutoencoderKLTemporalDecoder  # its annotations say tuples of one
    vae = autoencoder(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=64,
        force_upcast=False,
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=224,  # what diffusers' pipeline scales to, whatever the config
            patch_size=56,
            projection_dim=width,
        )
    )
    modules = {"unet": unet, "vae": vae, "image_encoder": vision}
    for name, module in modules.items():
        module.to(dtype).save_pretrained(folder / name, safe_serialization=True, **save)
    EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
    ).save_pretrained(folder / "scheduler")
    preprocessor(folder / "feature_extractor", side_pixels=224)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableVideoDiffusionPipeline"}))


def unet_class() -> Any:
    from diffusers import UNetSpatioTemporalConditionModel

    return UNetSpatioTemporalConditionModel


def make_inputs(shape: LatentShape, config: Mapping[str, Any], noise: Noise) -> Inputs:
    batch, frames, height, width = shape
    return {
        "sample": noise(batch, frames, 8, height, width),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": noise(batch, 1, config["cross_attention_dim"]),
        "added_time_ids": noise(batch, 3),
    }


def reference(
    model: I2VModel,
    prompt: Prompt,
    size: VideoSize,
    *,
    steps: int,
    cfg: float,
    seed: int,
    scheduler: str,
    output_type: str,
    **options: Any,
) -> Tensor:
    from diffusers import StableVideoDiffusionPipeline

    facts = family_of(model.architecture).facts
    pipeline = cast("Any", StableVideoDiffusionPipeline)
    pipe = pipeline(
        **model.modules,
        scheduler=make_scheduler(facts.scheduler(scheduler), model.architecture.config("scheduler")),
        feature_extractor=clip_processor(model.architecture.config("feature_extractor")),
    )
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        as_picture(prompt.image_FHWC),
        width=size.width_pixels,
        height=size.height_pixels,
        num_frames=size.frames,
        num_inference_steps=steps,
        max_guidance_scale=cfg,
        fps=prompt.fps,
        motion_bucket_id=prompt.motion_bucket,
        noise_aug_strength=prompt.noise_augmentation,
        generator=torch.Generator().manual_seed(AUGMENTATION_SEED),
        latents=initial_noise(facts.latent_size(size), seed).transpose(1, 2),
        output_type=output_type,
        **options,
    ).frames[0]
    if output_type == "latent":
        return made / model.architecture.config("vae")["scaling_factor"]
    return made.permute(0, 2, 3, 1)


SUBJECT = Subject(
    name="svd",
    published="svd",
    save=save_tiny_svd,
    denoiser=DenoiserSubject(
        cls=unet_class,
        chunked=spatio_temporal_unet.chunked,
        config={
            "down_block_types": ("DownBlockSpatioTemporal",) + ("CrossAttnDownBlockSpatioTemporal",) * 2,
            "up_block_types": ("CrossAttnUpBlockSpatioTemporal",) * 2 + ("UpBlockSpatioTemporal",),
            "block_out_channels": (32, 64, 96),
            "num_attention_heads": (2, 4, 6),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
        },
        other_layout={
            "block_out_channels": (32, 32, 64, 64),
            "num_attention_heads": (1, 2, 4, 4),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",) * 3 + ("DownBlockSpatioTemporal",),
            "up_block_types": ("UpBlockSpatioTemporal",) + ("CrossAttnUpBlockSpatioTemporal",) * 3,
        },
        make_inputs=make_inputs,
        more_arguments={},
        bounds_gib={(1024, 576, 14): (3.8, 1.3), (1024, 576, 25): (4.6, 2.2)},
    ),
    reference=reference,
)
