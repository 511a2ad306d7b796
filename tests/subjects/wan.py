"""The Wan test subjects: 2.1 I2V, 2.2 A14B with two experts, and 2.2 TI2V, whose first frame is the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from i2v_core.families import I2VModel, Prompt, VideoSize, family_of
from i2v_core.families.wan.transformer import chunked_wan
from i2v_core.sampling.noise import initial_noise
from i2v_core.sampling.schedulers import make_scheduler

from .parts import as_picture, preprocessor, umt5_tokenizer
from .subject import DenoiserSubject, Inputs, LatentShape, Noise, Subject

WAN_LAYOUTS = ("wan2.1-i2v", "wan2.2-a14b", "wan2.2-ti2v")
"""Wan with the picture in its context; with two experts; and with the picture as first latent frame."""


def save_tiny_wan(
    folder: Path,
    *,
    layout: str = WAN_LAYOUTS[0],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **save: Any,
) -> None:
    """Save a Wan of random weights, all of which matter, in diffusers layout; `save` goes to `save_pretrained`."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    has_vision, two_experts, is_ti2v = (layout == it for it in WAN_LAYOUTS)
    width, channels = 32, 48 if is_ti2v else 16
    vocabulary_size = umt5_tokenizer(folder / "tokenizer")

    def transformer() -> Any:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=channels if is_ti2v else 36,
            out_channels=channels,
            text_dim=width,
            freq_dim=16,
            ffn_dim=112,
            num_layers=2,
            rope_max_seq_len=64,
            image_dim=width if has_vision else None,
            added_kv_proj_dim=48 if has_vision else None,
        )

    residual = {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "decoder_base_dim": 16,
    }
    autoencoder: Any = AutoencoderKLWan
    vae = autoencoder(
        base_dim=8,
        z_dim=channels,
        num_res_blocks=1,
        latents_mean=torch.randn(channels).tolist(),
        latents_std=(0.5 + torch.rand(channels)).tolist(),
        **(residual if is_ti2v else {}),
    )
    text = UMT5EncoderModel(
        UMT5Config(vocab_size=vocabulary_size, d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    )
    modules: dict[str, Any] = {"transformer": transformer(), "vae": vae, "text_encoder": text}
    if two_experts:
        modules["transformer_2"] = transformer()
    if has_vision:
        modules["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        )
        preprocessor(folder / "image_processor", side_pixels=32)
    for name, module in modules.items():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2 / max(1, parameter[0].numel()) ** 0.5)
        torch.nn.Module.to(module, dtype)
        module.save_pretrained(folder / name, safe_serialization=True, **save)
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        folder / "scheduler"
    )
    index: dict[str, Any] = {"_class_name": "WanPipeline" if is_ti2v else "WanImageToVideoPipeline"}
    index |= {"expand_timesteps": True} if is_ti2v else {}
    index |= {"boundary_ratio": 0.9} if two_experts else {"boundary_ratio": None}
    (folder / "model_index.json").write_text(json.dumps(index))


def transformer_class() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel


def make_inputs(shape: LatentShape, config: Mapping[str, Any], noise: Noise) -> Inputs:
    batch, frames, height, width = shape
    tokens_of_frame = height * width // 4
    timestep = torch.full((batch,), 500.5)
    if config["in_channels"] == config["out_channels"]:  # a step for each token: the first frame is given
        timestep = timestep[:, None].repeat(1, frames * tokens_of_frame)
        timestep[:, :tokens_of_frame] = 0
    inputs = {
        "hidden_states": noise(batch, config["in_channels"], frames, height, width),
        "timestep": timestep,
        "encoder_hidden_states": noise(batch, 512, config["text_dim"]),
    }
    if config.get("image_dim"):
        inputs["encoder_hidden_states_image"] = noise(batch, 257, config["image_dim"])
    return inputs


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
    from diffusers import WanImageToVideoPipeline
    from diffusers.pipelines.wan import pipeline_wan_i2v
    from transformers import CLIPImageProcessor

    facts = family_of(model.architecture).facts
    index: dict[str, Any] = json.loads((model.folder / "model_index.json").read_text())
    processor: Any = CLIPImageProcessor
    has_vision = "image_encoder" in model.modules
    pipeline: Any = WanImageToVideoPipeline
    pipe = pipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.modules["text_encoder"],
        vae=model.modules["vae"],
        scheduler=make_scheduler(facts.scheduler(scheduler), model.architecture.config("scheduler")),
        image_processor=processor.from_pretrained(model.folder / "image_processor") if has_vision else None,
        image_encoder=model.modules.get("image_encoder"),
        transformer=model.modules["transformer"],
        transformer_2=model.modules.get("transformer_2"),
        boundary_ratio=index.get("boundary_ratio"),
        expand_timesteps=bool(index.get("expand_timesteps")),
    )
    pipe.set_progress_bar_config(disable=True)
    # The pipeline cleans the prompt with ftfy, without checking whether it is installed.
    setattr(pipeline_wan_i2v, "ftfy", SimpleNamespace(fix_text=lambda text: text))  # noqa: B010
    made = pipe(
        image=as_picture(prompt.image_FHWC),
        prompt=prompt.text,
        negative_prompt=prompt.negative_text,
        height=size.height_pixels,
        width=size.width_pixels,
        num_frames=size.frames,
        num_inference_steps=steps,
        guidance_scale=cfg,
        latents=initial_noise(facts.latent_size(size), seed),
        output_type=output_type,
        **options,
    ).frames[0]
    if output_type == "latent":
        config = model.architecture.config("vae")
        mean, deviation = (torch.tensor(config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        return made * deviation + mean
    return made.permute(0, 2, 3, 1)


def _subject(
    layout: str,
    published: str,
    *,
    bounds_gib: Mapping[tuple[int, int, int], tuple[float, float]],
    same_bits_from: int | None = 1,
    **config: Any,
) -> Subject:
    return Subject(
        name=layout,
        published=published,
        save=partial(save_tiny_wan, layout=layout),
        denoiser=DenoiserSubject(
            cls=transformer_class,
            chunked=chunked_wan,
            config={
                "num_attention_heads": 2,
                "attention_head_dim": 24,
                "in_channels": 36,
                "out_channels": 16,
                "text_dim": 32,
                "freq_dim": 16,
                "ffn_dim": 112,
                "num_layers": 3,
                "rope_max_seq_len": 64,
                **config,
            },
            other_layout={"num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 5},
            make_inputs=make_inputs,
            more_arguments={"attention_kwargs": {}},
            latent_multiple=2,
            same_bits_from=same_bits_from,
            has_skips=False,
            fewer_layers={"num_layers": 2},
            bounds_gib=bounds_gib,
        ),
        reference=reference,
    )


SUBJECTS = (
    _subject(
        "wan2.1-i2v",
        "wan2.1-i2v-14b",
        image_dim=40,
        added_kv_proj_dim=48,
        bounds_gib={(1280, 720, 81): (33.0, 3.0), (832, 480, 81): (32.0, 1.8)},
    ),
    _subject("wan2.2-a14b", "wan2.2-i2v-a14b", bounds_gib={(832, 480, 81): (28.5, 1.8)}),
    # Time steps of tokens are embedded as two rows instead of many, and so summed in another order.
    _subject(
        "wan2.2-ti2v",
        "wan2.2-ti2v-5b",
        same_bits_from=None,
        in_channels=16,
        bounds_gib={(1280, 704, 121): (10.5, 1.0)},
    ),
)
