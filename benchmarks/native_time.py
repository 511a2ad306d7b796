"""Time of one transformer block at its real width: core's own, and in chunks; both in turn, on this machine's CPU.

Run: `.venv/bin/python benchmarks/native_time.py [--frames 5] [--chunks 5] [--repeats 5] [--out FILE]`.
It counts the CPU seconds of one thread, which other programs on the machine change little. A card is another matter:
there a chunk must be large enough to fill it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))

from comfy_host.in_process import native_modules
from comfy_host.model_case import model_of

LATENT_ROWS, LATENT_COLUMNS = 16, 64
"""Of a frame: 256 tokens, so that five frames are five chunks of whole blocks of queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians of one block's calls, in CPU seconds."""

    model: str
    dtype: str
    tokens: int
    chunks: int
    repeats: int
    stock_cpu_seconds: float
    chunked_cpu_seconds: float
    ratio: float
    """Median of the ratios of calls that ran one after the other."""
    largest_difference: float
    """Of the results, as a share of the largest number."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=5, help="latent frames of 256 tokens")
    parser.add_argument("--chunks", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or both with a comma between")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    rows: list[Row] = []
    print(f"{'model':<14} {'dtype':<10} {'tokens':>6} {'chunks':>6} {'core s':>8} {'chunked s':>9} {'ratio':>6}")
    for dtype in options.dtype.split(","):
        row = _row(dtype, options.frames, options.chunks, options.repeats)
        rows.append(row)
        times = f"{row.stock_cpu_seconds:>8.2f} {row.chunked_cpu_seconds:>9.2f} {row.ratio:>6.3f}"
        print(f"{row.model:<14} {row.dtype:<10} {row.tokens:>6} {row.chunks:>6} {times}", flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps([asdict(it) for it in rows], indent=2) + "\n", "utf-8")


def _row(dtype: str, frames: int, chunks: int, repeats: int) -> Row:
    load = native_modules("i2v_native_time_benchmark")
    import torch
    from native_models.wan import CASES  # needs the host

    torch.set_num_threads(1)
    _, _, a14b = CASES[0]
    case = replace(
        a14b,
        config={**a14b.config, "num_layers": 1},
        latent_shape=(1, 16, frames, LATENT_ROWS, LATENT_COLUMNS),
    )
    model = model_of(case, getattr(torch, dtype), "cpu").diffusion_model.requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    block, args, kwargs = _block_call(model, case, getattr(torch, dtype))
    state = load("nodes.native.calls").CallState(
        workspace_bytes=1, dtype=args[0].dtype, runner=_chunks_runner(load, chunks)
    )
    patches = load("nodes.native.model").native_model(model).patches(model, state)
    chunked = next(it.replacement for it in patches if it.module is block)

    def stock(hidden: Any, *more: Any, **named: Any) -> Any:
        return type(block).forward(block, hidden, *more, **named)

    with torch.no_grad():
        pairs, difference = _timed_pairs(stock, chunked, args, kwargs, repeats)
    return Row(
        model="Wan 14B",
        dtype=dtype,
        tokens=args[0].shape[1],
        chunks=chunks,
        repeats=repeats,
        stock_cpu_seconds=round(statistics.median(it for it, _ in pairs), 3),
        chunked_cpu_seconds=round(statistics.median(it for _, it in pairs), 3),
        ratio=round(statistics.median(chunked / stock for stock, chunked in pairs), 4),
        largest_difference=difference,
    )


def _block_call(model: Any, case: Any, dtype: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model's block, and the arguments that core calls it with."""
    import torch

    generator = torch.Generator().manual_seed(0)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    block = model.blocks[0]

    def record(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise StopIteration

    hook = block.register_forward_pre_hook(record, with_kwargs=True)
    channels = case.config["in_dim"]
    latents = torch.randn((1, channels, *case.latent_shape[2:]), generator=generator).to(dtype)
    text = torch.randn(1, 512, 4096, generator=generator).to(dtype)
    try:
        with torch.no_grad():
            model(latents, torch.tensor([700.0]), context=text)
    except StopIteration:
        pass
    finally:
        hook.remove()
    ((args, kwargs),) = calls
    return block, args, kwargs


def _timed_pairs(
    stock: Callable[..., Any],
    chunked: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    repeats: int,
) -> tuple[list[tuple[float, float]], float]:
    """Seconds of both, one after the other in changing order, and how far their results lie apart."""
    hidden, *more = args

    def timed(run: Callable[..., Any]) -> tuple[float, Any]:
        own = hidden.clone()  # one of them works in place
        start = time.process_time()
        result = run(own, *more, **kwargs)
        return time.process_time() - start, result

    _, expected = timed(stock)
    _, result = timed(chunked)
    difference = float((result - expected).abs().max() / expected.abs().max())
    del expected, result
    pairs: list[tuple[float, float]] = []
    for index in range(repeats):
        order = (stock, chunked) if index % 2 == 0 else (chunked, stock)
        seconds = {run: timed(run)[0] for run in order}
        pairs.append((seconds[stock], seconds[chunked]))
    return pairs, difference


def _chunks_runner(load: Callable[[str], Any], count: int) -> Any:
    """Cuts every layer into so many chunks, whatever its memory."""

    class Chunks(load("i2v_core.chunking").LayerRunner):
        def chunk_slices(self, total: int, size: int) -> Iterator[slice]:  # noqa: ARG002
            yield from super().chunk_slices(total, -(-total // count))

    return Chunks()


if __name__ == "__main__":
    main()
