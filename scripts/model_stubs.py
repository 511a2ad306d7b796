"""Stand-ins for model files on a host: what a page or a plan reads of them, without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from i2v_core.families import bundled_architecture, family_of, with_weights
from i2v_core.placement.quantized import quantized_weights

ARCHITECTURES = Path(__file__).resolve().parents[1] / "i2v_core" / "families" / "architectures"
PIPELINES = {
    "i2vgen-xl": "I2VGenXLPipeline",
    "svd": "StableVideoDiffusionPipeline",
    "wan2.1-i2v-14b": "WanImageToVideoPipeline",
    "wan2.2-ti2v-5b": "WanPipeline",
}


def write_configs(name: str, folder: Path) -> None:
    """Write a published model's configs as a model folder without weights."""
    configs: dict[str, Any] = json.loads((ARCHITECTURES / f"{name}.json").read_text("utf-8"))
    configs.pop("family", None)
    index = {"_class_name": PIPELINES[name], **configs.pop("pipeline", {})}
    if "z_dim" in configs["vae"]:  # required to load the model, not used for the plan
        configs["vae"] |= dict.fromkeys(("latents_mean", "latents_std"), [1.0] * configs["vae"]["z_dim"])
    files = {
        "tokenizer": "tokenizer_config",
        "feature_extractor": "preprocessor_config",
        "image_processor": "preprocessor_config",
        "scheduler": "scheduler_config",
    }
    for part, content in configs.items():
        (folder / part).mkdir(parents=True)
        (folder / part / f"{files.get(part, 'config')}.json").write_text(json.dumps(content), "utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")


def write_header(name: str, file: Path) -> None:
    """Write a GGUF file for a published model's transformer in Q4_K: a header, and a sparse hole for the weights."""
    import gguf

    architecture = with_weights(bundled_architecture(name), "q4_k")
    with torch.device("meta"):
        transformer = family_of(architecture).skeleton(architecture, "transformer")
    quantised = quantized_weights(transformer)
    writer = gguf.GGUFWriter(None, "wan")
    hole_bytes = 0
    for weight, tensor in transformer.state_dict(keep_vars=True).items():
        kind = gguf.GGMLQuantizationType.Q4_K if tensor in quantised else gguf.GGMLQuantizationType.F16
        size_bytes = quantised[tensor].stored_bytes if tensor in quantised else 2 * tensor.numel()
        writer.add_tensor_info(weight, tensor.shape, np.dtype(np.float16), size_bytes, raw_dtype=kind)
        hole_bytes += size_bytes + writer.data_alignment
    file.parent.mkdir(exist_ok=True)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with file.open("r+b") as header:
        header.truncate(file.stat().st_size + hole_bytes)


def write_named_files(workflow: dict[str, Any], models_folder: Path) -> list[Path]:
    """Write empty files for the models that a workflow's nodes name, where their loaders list them."""
    named = [it for node in workflow["nodes"] for it in node["properties"].get("models", ())]
    files = [models_folder / it["directory"] / it["name"] for it in named]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return files
