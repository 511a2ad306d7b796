"""Exports the trained components to one folder in diffusers layout, in float16 safetensors."""

from __future__ import annotations

import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path

import diffusers
from diffusers import AutoencoderKL, I2VGenXLUNet
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from training.demo_model.noise import build_scheduler
from training.demo_model.settings import Settings
from training.demo_model.vision import build_feature_extractor

log = logging.getLogger(__name__)

MODEL_INDEX = {
    "_class_name": "I2VGenXLPipeline",
    "_diffusers_version": diffusers.__version__,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "I2VGenXLUNet"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def export(
    settings: Settings,
    folder: Path,
    *,
    tokenizer: Path,
    unet: I2VGenXLUNet,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    image_encoder: CLIPVisionModelWithProjection,
) -> int:
    """Write everything but the model card; return the bytes of the weights. `tokenizer` is a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "image_encoder": image_encoder}
    for name, part in parts.items():
        # half() changes the module in place, and training may still go on.
        deepcopy(part).half().save_pretrained(folder / name, safe_serialization=True)
    for name in ("unet", "vae"):
        _remove_origin(folder / name / "config.json")
    _restore_prefix(folder / "text_encoder" / "model.safetensors")
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    build_feature_extractor(settings.vision).save_pretrained(folder / "feature_extractor")
    build_scheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    log.info("%s: %.1f MB of weights", folder, size / 1e6)
    return size


def _restore_prefix(weights: Path) -> None:
    """Add the prefix of the text model's names, which transformers 5 drops; both versions read names with it."""
    prefix = "text_model."
    tensors = load_file(weights)
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in tensors.items()}
    save_file(named, weights, metadata={"format": "pt"})


def _remove_origin(config: Path) -> None:
    """Remove the folder that a part was loaded from, a path of this machine that diffusers writes."""
    entries = json.loads(config.read_text(encoding="utf-8"))
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
