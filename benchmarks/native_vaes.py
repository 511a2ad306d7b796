"""Core's autoencoders at their real size: name, size of a clip in pixels and frames, and the case."""

from __future__ import annotations

from comfy_host.vae_case import VAECase

_WAN = {
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
_HUNYUAN = {
    "block_out_channels": [128, 256, 512, 1024, 1024],
    "in_channels": 3,
    "out_channels": 3,
    "num_res_blocks": 2,
    "ffactor_spatial": 16,
    "ffactor_temporal": 4,
    "z_channels": 32,
}


def _wan_21(*latent_shape: int) -> VAECase:
    arguments = {"dim": 96, "z_dim": 16, "image_channels": 3, "conv_out_channels": 3, **_WAN}
    return VAECase(
        module="comfy.ldm.wan.vae", kind="WanVAE", arguments=arguments, latent_shape=latent_shape, downscale=8
    )


def _wan_22(*latent_shape: int) -> VAECase:
    arguments = {"dim": 160, "z_dim": 48, **_WAN}
    return VAECase(
        module="comfy.ldm.wan.vae2_2", kind="WanVAE", arguments=arguments, latent_shape=latent_shape, downscale=16
    )


def _hunyuan_15(*latent_shape: int) -> VAECase:
    arguments = {
        "regularizer_config": {"target": "comfy.ldm.models.autoencoder.EmptyRegularizer"},
        "encoder_config": {"target": "comfy.ldm.hunyuan_video.vae_refiner.Encoder", "params": _HUNYUAN},
        "decoder_config": {"target": "comfy.ldm.hunyuan_video.vae_refiner.Decoder", "params": _HUNYUAN},
    }
    return VAECase(
        module="comfy.sd", kind="AutoencodingEngine", arguments=arguments, latent_shape=latent_shape, downscale=16
    )


CASES = [
    ("Wan 2.1", "832×480×81", _wan_21(1, 16, 21, 60, 104)),
    ("Wan 2.1", "1280×720×81", _wan_21(1, 16, 21, 90, 160)),
    ("Wan 2.2", "1280×704×121", _wan_22(1, 48, 31, 44, 80)),
    ("HunyuanVideo 1.5", "1280×720×121", _hunyuan_15(1, 32, 31, 45, 80)),
]
