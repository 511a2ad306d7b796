"""Compares ways to decode one frame: peak, time, and the difference from the untiled frame.

    python benchmarks/decode.py                                  the published autoencoder, random weights
    python benchmarks/decode.py --model demo --size 512x512      the demo model's, trained: differences of pictures

Compared are this pack's decoders (untiled, and in tiles of several sizes, with feature maps on the device or
offloaded), diffusers' blended tiles, and ComfyUI's own tiled decode if a host is given (`--comfyui`, or COMFYUI_PATH).
Peaks count live tensors without the weights; on CUDA they are the allocator's. Random weights need the memory and the
time of trained ones, but their frames are noise: the demo model shows realistic differences.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from i2v_core.chunking import LayerRunner
from i2v_core.decoding import TilingSettings
from i2v_core.families import Placed, autoencoder_kl, bundled_architecture, family_of
from i2v_core.memory.stage_meter import stage_meter
from i2v_core.units import MIB

DEMO_VAE = Path(__file__).resolve().parents[1] / "assets" / "demo_model" / "vae"
Decode = Callable[[], Tensor]
SEED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One decoder, compared with the untiled frame. The names are keys of the committed JSON."""

    way: str
    peak_bytes: int
    seconds: float

    times_whole: float
    """Time over that of the untiled frame."""

    levels: float
    """Largest difference from the untiled frame, in 255ths of the range."""

    psnr_db: float | None
    """None if the frames are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An autoencoder on its device, and the latents (1, C, h, w) of one frame."""

    vae: Any
    samples: Tensor

    def tiled(self, tiling: TilingSettings) -> Decode:
        placed = Placed(module=self.vae, device=self.samples.device, dtype=self.samples.dtype, runner=LayerRunner())
        return lambda: next(autoencoder_kl.decode(placed, self.samples, tiling, on_chunk=lambda: None))

    def blended(self, tile_pixels: int) -> Decode:
        """Decode with diffusers' own tiles, which overlap by a quarter."""

        def decode() -> Tensor:
            self.vae.enable_tiling()
            self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = tile_pixels, tile_pixels // 8
            try:
                return to_frames(self.vae.decode(self.samples).sample)
            finally:
                self.vae.disable_tiling()

        return decode


def to_frames(decoded_N3HW: Tensor) -> Tensor:
    return (decoded_N3HW.permute(0, 2, 3, 1).float() / 2 + 0.5).clamp(0, 1).cpu()


def subject(model: str, size: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Subject:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(SEED)
    width, height = size
    if model == "demo":
        vae: Any = AutoencoderKL.from_pretrained(DEMO_VAE).eval()
        coarse = torch.rand(1, 3, height // 64, width // 64)
        picture = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1) * 2 - 1
        samples = vae.encode(picture).latent_dist.mode()
    else:
        architecture = bundled_architecture(model)
        vae = family_of(architecture).skeleton(architecture, "vae")
        samples = torch.randn(1, vae.config.latent_channels, height // 8, width // 8)
    return Subject(vae=vae.to(device, dtype), samples=samples.to(device, dtype))


def decoders(autoencoder: Subject, tiles: list[int], comfyui: Path | None) -> Iterator[tuple[str, Decode]]:
    yield "whole frame", autoencoder.tiled(TilingSettings(chunk_size=1))
    for tile in tiles:
        yield f"tiles of {tile}", autoencoder.tiled(TilingSettings(chunk_size=1, tile_pixels=tile))
    yield (
        f"tiles of {tiles[-1]}, maps offloaded",
        autoencoder.tiled(TilingSettings(chunk_size=1, tile_pixels=tiles[-1], maps_bytes=0)),
    )
    for tile in tiles:
        yield f"diffusers, blended tiles of {tile}", autoencoder.blended(tile)
    if (
        comfyui is not None and autoencoder.vae.config.norm_num_groups == 32
    ):  # the only configuration that ComfyUI supports
        decode_in_host = comfyui_decoder(autoencoder, comfyui)
        for tile in tiles:
            yield f"ComfyUI VAEDecodeTiled, {tile}", decode_in_host(tile)


def comfyui_decoder(autoencoder: Subject, comfyui: Path) -> Callable[[int], Decode]:
    """ComfyUI's own VAE of the same weights, with its default overlap of 64 pixels (a quarter of small tiles)."""
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args  # pyright: ignore[reportMissingImports]

    args.cpu = autoencoder.samples.device.type == "cpu"
    import comfy.model_management  # pyright: ignore[reportMissingImports]
    import comfy.sd  # pyright: ignore[reportMissingImports]

    vae = comfy.sd.VAE(
        sd={name: it.cpu() for name, it in autoencoder.vae.state_dict().items()}, dtype=autoencoder.samples.dtype
    )
    comfy.model_management.load_models_gpu(
        [vae.patcher]
    )  # placed before, so that the peak counts only what is added to the weights

    def decode_tiled(tile: int) -> Decode:
        overlap = min(64, tile // 4) // 8
        return lambda: vae.decode_tiled(
            autoencoder.samples.float().cpu(), tile_x=tile // 8, tile_y=tile // 8, overlap=overlap
        ).cpu()

    return decode_tiled


def measured(decode: Decode, device: torch.device) -> tuple[Tensor, int, float]:
    with torch.no_grad(), stage_meter(device) as meter:
        frame = decode()
    return frame, meter.peak_bytes, meter.seconds


def row(name: str, frame: Tensor, peak_bytes: int, seconds: float, whole: Tensor, whole_seconds: float) -> Row:
    difference = (frame.reshape(whole.shape) - whole).abs()
    mse = difference.square().mean().item()
    return Row(
        way=name,
        peak_bytes=peak_bytes,
        seconds=seconds,
        times_whole=seconds / whole_seconds,
        levels=255 * difference.max().item(),
        psnr_db=10 * torch.log10(torch.tensor(1 / mse)).item() if mse else None,
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| decoder | peak without the weights | time | × whole | largest difference | PSNR |",
        "|---|" + "---|" * 5,
    ]
    for it in rows:
        psnr = "the same" if it.psnr_db is None else f"{it.psnr_db:.0f} dB"
        lines.append(
            f"| {it.way} | {it.peak_bytes / MIB:.0f} MiB | {it.seconds:.2f} s | {it.times_whole:.2f} | "
            f"{it.levels:.2f} / 255 | {psnr} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("i2vgen-xl", "demo"), default="i2vgen-xl")
    parser.add_argument("--size", default="512x512", help="of the frame, in pixels")
    parser.add_argument("--tile", type=int, action="append", help="side in pixels; may be given more than once")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: float16 on CUDA")
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_PATH"), help="a ComfyUI folder")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype or ("float16" if device.type == "cuda" else "float32"))
    width, height = (int(side) for side in given.size.split("x"))
    with torch.no_grad():
        autoencoder = subject(given.model, (width, height), device, dtype)
        measured(autoencoder.tiled(TilingSettings(chunk_size=1)), device)  # warms up
        rows: list[Row] = []
        whole: tuple[Tensor, float] | None = None
        for name, decode in tqdm(list(decoders(autoencoder, given.tile or [256, 128], given.comfyui)), unit="decoder"):
            frame, peak_bytes, seconds = measured(decode, device)
            whole = whole or (frame, seconds)
            rows.append(row(name, frame, peak_bytes, seconds, *whole))
    print(table(rows))
    if given.json is not None:
        about = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("torch", "diffusers")},
            "model": given.model,
            "size": given.size,
            "dtype": str(dtype),
        }
        given.json.write_text(json.dumps({**about, "rows": [asdict(it) for it in rows]}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
