"""Activation memory of one call of core's video models: core's own, and in chunks; traced on meta tensors, as on a CUDA
device with PyTorch's attention and without comfy_kitchen's kernels (core turns those off below CUDA 13).

Run: `.venv/bin/python benchmarks/native.py [--only NAME] [--out FILE]`. Each row is printed, and written, as it ends.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from comfy_host.in_process import native_modules
from comfy_host.model_case import ModelCase, model_of, sampler_input


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
    core_estimate_bytes: int
    """Core's own estimate of the call, by which it reserves memory."""
    predict_seconds: float
    """CPU time of the first prediction: the shapes of the call, its twin, and core's own peak."""
    plan_seconds: float
    """CPU time of choosing the cut after that."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    native = _load()
    from native_models import real_models  # needs the host

    rows: list[Row] = []
    heads = ("core", "planned", "lowest", "estimate")
    print(f"{'model':<22} {'size':<14} " + " ".join(f"{it:>9}" for it in heads) + "  GiB   seconds to predict, plan")
    for name, size, case in real_models():
        if options.only.lower() not in name.lower() or not case.exists:
            continue
        row = _row(native, name, size, case)
        rows.append(row)
        figures = (row.stock_bytes, row.planned_bytes, row.lowest_bytes, row.core_estimate_bytes)
        columns = " ".join(f"{it / 2**30:>9.2f}" for it in figures)
        print(f"{name:<22} {size:<14} {columns} {row.predict_seconds:>12.2f} {row.plan_seconds:>6.2f}", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps([asdict(it) for it in rows], indent=2) + "\n", "utf-8")


def _row(native: Any, name: str, size: str, case: ModelCase) -> Row:
    import torch
    from comfy.ldm.modules import attention  # pyright: ignore[reportMissingImports]

    def fused(_chosen: Any, *args: Any, **kwargs: Any) -> Any:
        return native.attention_memory.attention_output(attention.attention_pytorch.__wrapped__, *args, **kwargs)

    base = model_of(case, torch.bfloat16, "meta")
    latent_shape, conds, part_shapes = sampler_input(case)
    start = time.process_time()
    twin = native.twin.Twin(
        native.model.native_model(base.diffusion_model),
        base.diffusion_model,
        torch.bfloat16,
        device=torch.device("cuda"),
        attention=fused,
    )

    call = native.recorded_call.recorded_calls(base, latent_shape, conds, latent_shapes=part_shapes)[0].call

    def peak(workspace_bytes: int | None) -> int:
        return twin.peak_bytes(call, workspace_bytes)

    peak(None)
    predicted = time.process_time()
    plan = native.call_plan.plan_call(peak, usable_bytes=2**40, weights_bytes=2**41, held_bytes=0)
    planned = time.process_time()
    return Row(
        model=name,
        size=size,
        stock_bytes=plan.stock_bytes,
        planned_bytes=plan.peak_bytes,
        planned_workspace_bytes=plan.workspace_bytes,
        lowest_bytes=native.call_plan.finest_peak_bytes(peak),
        # As core's `BaseModel.memory_required` has it where attention is a fused kernel, on a card.
        core_estimate_bytes=int(math.prod(latent_shape[2:]) * 2 * 0.01 * base.memory_usage_factor * 2**20),
        predict_seconds=round(predicted - start, 3),
        plan_seconds=round(planned - predicted, 3),
    )


def _load() -> Any:
    """The modules of the native models, beside a host that is not running."""
    load = native_modules("i2v_native_benchmark")
    names = ("twin", "model", "call_plan", "recorded_call", "attention_memory")
    return types.SimpleNamespace(**{name: load(f"nodes.native.{name}") for name in names})


if __name__ == "__main__":
    main()
