"""The I2VGen-XL test subject."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from i2v_core import chunking
from i2v_core.families import I2VModel, Prompt, VideoSize, family_of
from i2v_core.families.clip import encode_text, tokenize
from i2v_core.sampling.noise import initial_noise
from i2v_core.sampling.schedulers import make_scheduler

from .parts import as_picture, clip_processor, clip_tokenizer, preprocessor
from .subject import DenoiserSubject, Inputs, LatentShape, Noise, Subject

TEXT_TOKENS = 7


def save_tiny_i2vgen_xl(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **save: Any) -> None:
    """Save an I2VGen-XL of random weights in diffusers layout; `save` is passed to every `save_pretrained`."""
    from diffusers import AutoencoderKL, DDIMScheduler, I2VGenXLUNet
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    width = 32
    clip_tokenizer(folder / "tokenizer")
    vocabulary = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    unet = I2VGenXLUNet(
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=8,
    )
    autoencoder: Any = AutoencoderKL  # its annotations say tuples of one
    vae = autoencoder(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        force_upcast=False,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=16,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
    )
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            projection_dim=width,
        )
    )
    modules = {"unet": unet, "vae": vae, "text_encoder": text, "image_encoder": vision}
    for name, module in modules.items():
        module.to(dtype).save_pretrained(folder / name, safe_serialization=True, **save)
    DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False).save_pretrained(
        folder / "scheduler"
    )
    preprocessor(folder / "feature_extractor", side_pixels=32)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "I2VGenXLPipeline"}))


def unet_class() -> Any:
    from diffusers import I2VGenXLUNet

    return I2VGenXLUNet


def make_inputs(shape: LatentShape, config: Mapping[str, Any], noise: Noise) -> Inputs:
    batch, frames, height, width = shape
    context_width = config["cross_attention_dim"]
    return {
        "sample": noise(batch, 4, frames, height, width),
        "timestep": torch.tensor(501),
        "fps": torch.full((batch,), 16),
        "image_latents": noise(batch, 4, frames, height, width),
        "image_embeddings": noise(batch, context_width),
        "encoder_hidden_states": noise(batch, TEXT_TOKENS, context_width),
    }


def make_the_picture_certain(model: I2VModel) -> None:
    """Make the variance of encoded pictures negligible, since the pipeline samples latents where we take the mode."""
    quant_conv: Any = model.modules["vae"].quant_conv
    quant_conv.weight.data[4:] = 0
    quant_conv.bias.data[4:] = -30


def pipeline_of(model: I2VModel, scheduler: Any) -> Any:
    from diffusers.pipelines.deprecated.i2vgen_xl import pipeline_i2vgen_xl

    pipeline: Any = pipeline_i2vgen_xl.I2VGenXLPipeline
    pipe = pipeline(
        **model.modules,
        tokenizer=model.tokenizer,
        feature_extractor=clip_processor(model.architecture.config("feature_extractor")),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    """Run diffusers' pipeline, with text embedded here: it uses an inner model that transformers 5 no longer has."""
    facts = family_of(model.architecture).facts

    def embedded(text: str) -> Tensor:
        with torch.no_grad():
            return encode_text(model.modules["text_encoder"], tokenize(model.tokenizer, text), clip_skip=1)

    pipe = pipeline_of(model, make_scheduler(facts.scheduler(scheduler), model.architecture.config("scheduler")))
    made = pipe(
        prompt_embeds=embedded(prompt.text),
        negative_prompt_embeds=embedded(prompt.negative_text),
        image=as_picture(prompt.image_FHWC),
        width=size.width_pixels,
        height=size.height_pixels,
        num_frames=size.frames,
        target_fps=prompt.fps,
        num_inference_steps=steps,
        guidance_scale=cfg,
        output_type=output_type,
        latents=initial_noise(facts.latent_size(size), seed),
        **options,
    ).frames[0]
    if output_type == "latent":
        return made.transpose(0, 1) / model.architecture.config("vae")["scaling_factor"]
    return made.permute(0, 2, 3, 1)


SUBJECT = Subject(
    name="i2vgen-xl",
    published="i2vgen-xl",
    save=save_tiny_i2vgen_xl,
    denoiser=DenoiserSubject(
        cls=unet_class,
        chunked=chunking.chunked,
        config={
            "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
            "up_block_types": ("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D"),
            "block_out_channels": (32, 64, 96),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": 64,
            "attention_head_dim": 8,
        },
        other_layout={
            "block_out_channels": (16, 24, 32, 32),
            "layers_per_block": 2,
            "down_block_types": ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",),
            "up_block_types": ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3,
        },
        make_inputs=make_inputs,
        more_arguments={"cross_attention_kwargs": {}},
        same_bits_from=2**40,
        bounds_gib={
            (512, 512, 16): (3.1, 1.2),
            (768, 768, 24): (4.3, 2.2),
            (1280, 704, 16): (3.95, 1.8),
            (1024, 1024, 32): (5.7, 3.5),
        },
    ),
    reference=reference,
    before_reference=make_the_picture_certain,
)
