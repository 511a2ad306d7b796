"""Memory of decoding with core's autoencoders: its own code, its tiles, and VRAM Fit's bands; traced on meta tensors.

Run: `.venv/bin/python benchmarks/native_decode.py [--only NAME] [--out FILE] [--run]`. Each row is printed, and
written, as it ends. `--run` also decodes a small clip on the CPU with random weights: the times of core's own code and
of bands beside each other, and how far bands and core's tiles are from it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from comfy_host.in_process import native_modules
from comfy_host.vae_case import VAECase

GIB = 2**30
_TILE_PIXELS, _TILE_FRAMES = 512, 64
"""Of core's *VAE Decode (Tiled)*, by default."""
_SMALL_PIXELS, _SMALL_LATENT_FRAMES, _PAIRS = 96, 2, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Bytes beside the weights, in fp16."""

    model: str
    size: str
    stock_bytes: int
    core_reserves_bytes: int
    core_tiled_bytes: int
    """Core's tiled decode of one tile, whose frames differ."""
    on_device_bytes: int
    """Bands with all feature maps on the device."""
    gib_bytes: int
    """The fastest bands within 1 GiB."""
    lowest_bytes: int
    encode_stock_bytes: int
    encode_lowest_bytes: int
    trace_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A small clip on the CPU in fp32, with random weights."""

    model: str
    size: str
    stock_seconds: float
    bands_seconds: float
    bands_db: float | None
    """Peak signal-to-noise ratio to core's own frames; None: equal."""
    tiled_db: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    parser.add_argument("--run", action="store_true", help="decode a small clip too")
    options = parser.parse_args()
    load = native_modules("i2v_decode_benchmark")
    from native_vaes import CASES

    rows: list[Row | RunRow] = []
    heads = ("core", "reserves", "tiled", "on device", "1 GiB", "lowest", "encode", "lowest")
    print(f"{'model':<22} {'size':<14} " + " ".join(f"{it:>9}" for it in heads) + "  GiB   seconds to trace")
    for name, size, case in CASES:
        if options.only.lower() not in name.lower():
            continue
        row = _row(load, name, size, case)
        rows.append(row)
        figures = list(asdict(row).values())[2:-1]
        columns = " ".join(f"{it / GIB:>9.2f}" for it in figures)
        print(f"{name:<22} {size:<14} {columns} {row.trace_seconds:>8.1f}", flush=True)
        _write(options.out, rows)
    for name, _, case in CASES if options.run else ():
        if options.only.lower() not in name.lower():
            continue
        ran = _run_row(load, name, case)
        rows.append(ran)
        print(ran, flush=True)
        _write(options.out, rows)


def _row(load: Callable[[str], Any], name: str, size: str, case: VAECase) -> Row:
    import torch

    bands = load("nodes.native.vae.bands").CANDIDATES
    meta = torch.device("meta")
    with meta:
        vae = case.vae(torch.float16, torch.device("cpu"), lambda _, shape: torch.empty(shape, device=meta))
    start = time.perf_counter()
    model = vae.first_stage_model
    native = load("nodes.native.vae.model").native_vae(model)
    twin = load("nodes.native.vae.twin").VAETwin(native, model, torch.float16)
    batch, channels, frames, height, width = case.latent_shape
    pixels = (batch, 3, native.frames(frames), case.downscale * height, case.downscale * width)
    tile = min(_TILE_PIXELS // case.downscale, height), min(_TILE_PIXELS // case.downscale, width)
    tile_frames = min(frames, native.latent_frames(_TILE_FRAMES))
    peaks = [twin.decode_bytes(case.latent_shape, it) for it in bands]
    return Row(
        model=name,
        size=size,
        stock_bytes=peaks[0],
        core_reserves_bytes=int(vae.memory_used_decode(case.latent_shape, torch.float16)),
        core_tiled_bytes=twin.decode_bytes((batch, channels, tile_frames, *tile), None),
        on_device_bytes=min(peak for peak, it in zip(peaks, bands, strict=True) if it and it.maps_bytes is None),
        gib_bytes=next(it for it in peaks if it <= GIB),
        lowest_bytes=peaks[-1],
        encode_stock_bytes=twin.encode_bytes(pixels, None),
        encode_lowest_bytes=twin.encode_bytes(pixels, bands[-1]),
        trace_seconds=round(time.perf_counter() - start, 1),
    )


def _run_row(load: Callable[[str], Any], name: str, case: VAECase) -> RunRow:
    import torch

    generator = torch.Generator().manual_seed(0)

    def weight(name: str, shape: Any) -> Any:
        if name.endswith("weight"):
            return torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)

    vae = case.vae(torch.float32, torch.device("cpu"), weight)
    model, cpu, side = vae.first_stage_model, torch.device("cpu"), _SMALL_PIXELS // case.downscale
    latent = torch.randn(1, case.latent_shape[1], _SMALL_LATENT_FRAMES, side, side, generator=generator)
    bands = load("nodes.native.vae.bands")
    native = load("nodes.native.vae.model").native_vae(model)
    made = torch.empty(0)
    stock_seconds: list[float] = []
    bands_seconds: list[float] = []
    with torch.inference_mode():  # as core runs its nodes
        for _ in range(_PAIRS):
            start = time.perf_counter()
            frames = model.decode(latent)
            stock_seconds.append(time.perf_counter() - start)
            made = torch.empty_like(frames)
            runner = bands.BandRunner(cpu, torch.float32)
            chosen = bands.Bands(workspace_bytes=8 * 2**20, maps_bytes=0)
            banded = bands.BandedPass(device=cpu, dtype=torch.float32, bands=chosen, runner=runner)
            start = time.perf_counter()
            native.decode(model, latent, banded, lambda at, rows, it, made=made: made[0, :, at, rows].copy_(it))
            bands_seconds.append(time.perf_counter() - start)
        tile = side // 2
        tiled = vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=tile // 4)
        plain = vae.decode(latent)
        made = vae.process_output(made).movedim(1, -1)
    return RunRow(
        model=name,
        size=f"{_SMALL_PIXELS}×{_SMALL_PIXELS}×{native.frames(_SMALL_LATENT_FRAMES)}",
        stock_seconds=round(min(stock_seconds), 2),
        bands_seconds=round(min(bands_seconds), 2),
        bands_db=_db(made, plain),
        tiled_db=_db(tiled, plain),
    )


def _db(made: Any, plain: Any) -> float | None:
    error = float((made - plain).double().square().mean())
    return None if error == 0 else round(-10 * math.log10(error), 1)


def _write(out: Path | None, rows: list[Row | RunRow]) -> None:
    if out is not None:
        out.write_text(json.dumps([asdict(it) for it in rows], indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
