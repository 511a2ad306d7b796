"""Activation memory of one call of core's video models: core's own, and in chunks; traced on meta tensors.

Run: `.venv/bin/python benchmarks/native.py [--out FILE]`. Each row is printed, and written, as it ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from comfy_host.in_process import native_modules

WAN = {
    "image_model": "wan2.1",
    "patch_size": (1, 2, 2),
    "text_len": 512,
    "freq_dim": 256,
    "text_dim": 4096,
    "window_size": (-1, -1),
    "qk_norm": True,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "num_layers": 2,  # of the 30 or 40: the peak is the same
}
WIDE = {**WAN, "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "out_dim": 16, "in_dim": 36}
A14B = ("WAN21_T2V", {**WIDE, "model_type": "t2v"})
I2V_14B = ("WAN21_I2V", {**WIDE, "model_type": "i2v"})
TI2V_5B = (
    "WAN22_T2V",
    {**WAN, "model_type": "t2v", "dim": 3072, "ffn_dim": 14336, "num_heads": 24, "in_dim": 48, "out_dim": 48},
)
# Model, frames, latent (channels, frames, height, width), CLIP vision tokens.
CASES: list[tuple[str, tuple[str, dict[str, Any]], str, tuple[int, int, int, int], int]] = [
    ("Wan 2.2 A14B", A14B, "832×480×81", (36, 21, 60, 104), 0),
    ("Wan 2.2 A14B", A14B, "1280×720×81", (36, 21, 90, 160), 0),
    ("Wan 2.1 I2V 14B", I2V_14B, "1280×720×81", (36, 21, 90, 160), 257),
    ("Wan 2.2 TI2V-5B", TI2V_5B, "1280×704×121", (48, 31, 44, 80), 0),
]
TEXT_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Bytes of activations of one call of one guidance branch."""

    model: str
    size: str
    stock_bytes: int
    planned_bytes: int
    """With the cut that is planned where the weights do not fit beside the call."""
    planned_workspace_bytes: int | None
    lowest_bytes: int
    """With the finest cut."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    native = _load()
    rows: list[Row] = []
    print(f"{'model':<18} {'size':<14} {'core':>9} {'planned':>9} {'lowest':>9}   GiB")
    for case in CASES:
        row = _row(native, *case)
        rows.append(row)
        figures = (row.stock_bytes, row.planned_bytes, row.lowest_bytes)
        print(f"{row.model:<18} {row.size:<14} " + " ".join(f"{it / 2**30:>9.2f}" for it in figures), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps([asdict(it) for it in rows], indent=2) + "\n", "utf-8")


def _row(
    native: Any, name: str, model: tuple[str, dict[str, Any]], size: str, latent: tuple[int, ...], image_tokens: int
) -> Row:
    import torch
    from comfy import supported_models  # pyright: ignore[reportMissingImports]

    chosen = getattr(supported_models, model[0])(dict(model[1]))
    chosen.set_inference_dtype(torch.bfloat16, None)
    base = chosen.get_model({}, "", device="meta")
    twin = native.twin.Twin(native.model.native_model(base.diffusion_model), base.diffusion_model, torch.bfloat16)
    kwargs: dict[str, Any] = {"context": torch.empty(1, TEXT_TOKENS, 4096, dtype=torch.bfloat16, device="meta")}
    if image_tokens:
        kwargs["clip_fea"] = torch.empty(1, image_tokens, 1280, dtype=torch.bfloat16, device="meta")
    x = torch.empty(1, *latent, dtype=torch.bfloat16, device="meta")
    call = native.twin.Call(base.diffusion_model, (x, torch.empty(1, device="meta")), kwargs)

    def peak(workspace_bytes: int | None) -> int:
        return twin.peak_bytes(call, workspace_bytes)

    plan = native.call_plan.plan_call(peak, usable_bytes=2**40, weights_bytes=2**41, held_bytes=0)
    return Row(
        model=name,
        size=size,
        stock_bytes=plan.stock_bytes,
        planned_bytes=plan.peak_bytes,
        planned_workspace_bytes=plan.workspace_bytes,
        lowest_bytes=native.call_plan.finest_peak_bytes(peak),
    )


def _load() -> Any:
    """The modules of the native models, beside a host that is not running."""
    load = native_modules("i2v_native_benchmark")
    return types.SimpleNamespace(**{name: load(f"nodes.native.{name}") for name in ("twin", "model", "call_plan")})


if __name__ == "__main__":
    main()
