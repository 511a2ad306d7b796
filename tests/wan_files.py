"""Small Wan transformers in the formats that users have: GGUF and fp8, with the published code's weight names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor

QuantizationType = gguf.GGMLQuantizationType

_TO_PUBLISHED = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("attn2", "cross_attn"),
    ("attn1", "self_attn"),
    (".to_out.0.", ".o."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".norm_added_k.", ".norm_k_img."),
    ("proj_out", "head.head"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
)


def published_name(name: str) -> str:
    """Return the published code's name of a weight, given diffusers' name."""
    if name.endswith("scale_shift_table"):
        return name.replace("scale_shift_table", "modulation" if "." in name else "head.modulation")
    if name.startswith("blocks.") and ".norm3." in name:
        return name.replace(".norm3.", ".norm2.")
    for ours, theirs in _TO_PUBLISHED:
        name = name.replace(ours, theirs)
    return name


def tiny_transformer(*, sees: bool = True, seed: int = 0, **config: Any) -> Any:
    """Build a transformer with random weights whose rows are multiples of 32 numbers."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    wanted: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 128,
        "num_layers": 2,
        "rope_max_seq_len": 64,
        "image_dim": 32 if sees else None,
        "added_kv_proj_dim": 64 if sees else None,
    }
    transformer = WanTransformer3DModel(**{**wanted, **config})
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 / max(1, parameter[0].numel()) ** 0.5)
    return transformer.eval()


def save_wan_of_blocks(save_wan: Callable[..., None], folder: Path, *, layout: str = "wan2.1-i2v") -> dict[str, Any]:
    """Save a small Wan without its transformers' weights; return the transformers by component."""
    save_wan(folder, layout=layout)
    names = [name for name in ("transformer", "transformer_2") if (folder / name).is_dir()]
    made = {name: tiny_transformer(sees="2.1" in layout, seed=seed) for seed, name in enumerate(names)}
    for name, transformer in made.items():
        for file in (folder / name).iterdir():
            file.unlink()
        transformer.save_config(folder / name)
    return made


def small_types(name: str, tensor: Tensor) -> QuantizationType:
    """Choose types as files of 4 to 5 bits do: most weights small, some in a better format, the rest as floats."""
    if tensor.ndim != 2 or "modulation" in name:
        return QuantizationType.F32
    if "text_embedding" in name:
        return QuantizationType.F16
    if "head" in name:
        return QuantizationType.BF16
    return QuantizationType.Q8_0 if ".v." in name or "time" in name else QuantizationType.Q4_0


def write_gguf(
    file: Path,
    weights: Mapping[str, Tensor],
    types: Callable[[str, Tensor], QuantizationType] = small_types,
    architecture: str = "wan",
    *,
    flat: bool = False,
) -> Path:
    """Write weights with diffusers' names to a GGUF file; `flat`: with no more dimensions than llama.cpp supports."""
    writer = gguf.GGUFWriter(file, architecture)
    for name, tensor in weights.items():
        published = published_name(name)
        kind = types(published, tensor)
        too_many = flat and tensor.ndim > 4
        if too_many:
            writer.add_array(f"comfy.gguf.orig_shape.{published}", list(tensor.shape))
        numbers = quantize((tensor.flatten(2) if too_many else tensor).float().numpy(), kind)
        writer.add_tensor(published, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_fp8(
    file: Path, weights: Mapping[str, Tensor], *, scaled: bool, prefix: str = "", everything: bool = False
) -> Path:
    """Weights, named by diffusers, in fp8; norms and biases in bf16, unless it is `everything`. `scaled`: as ComfyUI's
    files are.
    """
    content: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        published = prefix + published_name(name)
        if tensor.ndim != 2 or "modulation" in published:
            content[published] = tensor.to(torch.float8_e4m3fn if everything else torch.bfloat16).contiguous()
            continue
        scale = (tensor.abs().max() / 448).float() if scaled else torch.tensor(1.0)
        content[published] = (tensor / scale).to(torch.float8_e4m3fn)
        if scaled:
            content[published.removesuffix("weight") + "scale_weight"] = scale
    if scaled:
        content[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(content, file)
    return file


def read_by_diffusers(file: Path, folder: Path, dtype: torch.dtype) -> Any:
    """Load the transformer with diffusers' own GGUF reader."""
    from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

    return WanTransformer3DModel.from_single_file(
        str(file),
        config=str(folder),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
        local_files_only=True,
    ).eval()


def with_one_removed(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    assert name in weights
    return {other: tensor for other, tensor in weights.items() if other != name}
