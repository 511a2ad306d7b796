"""Reading model folders in diffusers layout: one subfolder a component, safetensors only, checked before loading."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import ModelFolderError

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@contextmanager
def configs_read(folder: Path) -> Generator[None]:
    """Turn any failure of the body, which checks values of the folder's configs, into a `ModelFolderError`.

    Third-party classes raise errors of all kinds for values that make no sense.

    Raises:
        ModelFolderError: the body fails.
    """
    try:
        yield
    except Exception as error:
        raise ModelFolderError(
            f"the configs in {folder} make no model ({error!r})", "download the config files again"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSpec:
    """Files that the folder of one component must hold."""

    name: str

    files: tuple[str, ...] = ("config.json",)
    """Names of files; a name may give alternatives, as in "a.json|b.json"."""

    weights_stem: str | None = None
    """Name of the weights file without variant and suffix; None for components without weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The weight files of one component that will be loaded."""

    folder: Path

    variant: str | None
    """Variant in the files' names, such as "fp16"; None for the plain ones."""

    files: tuple[Path, ...]

    dtype: torch.dtype
    """The dtype of most tensors in the files."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `ModelFolderError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFolderError(f"{path} cannot be read as JSON ({error})", "download the file again") from error
    if not isinstance(content, dict):
        raise ModelFolderError(f"{path} holds no JSON object", "download the file again")
    return cast("dict[str, Any]", content)


def pipeline_class(folder: Path) -> str | None:
    """Return the pipeline class that the folder's model_index.json names; None if there is no such file."""
    index = folder / "model_index.json"
    return read_json(index).get("_class_name") if index.is_file() else None


def check_folder(folder: Path, components: Iterable[ComponentSpec]) -> dict[str, Weights]:
    """Check that every file is there and intact, and return the weights by component name.

    Raises:
        ModelFolderError: one error that names all that is missing, damaged or refused.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"the model folder {folder} does not exist", "choose another model in I2V Loader")
    weights: dict[str, Weights] = {}
    problems: list[str] = []
    for component in components:
        problems += _missing_files(folder, component)
        if component.weights_stem is not None:
            found, weight_problems = _find_weights(folder / component.name, component.weights_stem)
            problems += weight_problems
            if found is not None:
                weights[component.name] = found
    if problems:
        raise ModelFolderError(
            f"the model folder {folder} is not complete: " + "; ".join(problems),
            "download the missing files in diffusers layout as safetensors",
        )
    return weights


def _missing_files(folder: Path, component: ComponentSpec) -> list[str]:
    return [
        f"{component.name}/{names.replace('|', ' or ')} is missing"
        for names in component.files
        if not any((folder / component.name / name).is_file() for name in names.split("|"))
    ]


def _find_weights(folder: Path, stem: str) -> tuple[Weights | None, list[str]]:
    """Return the first complete set of weight files, plain before variants, or the problems of those that are there."""
    problems: list[str] = []
    for variant, names in _weight_sets(folder, stem):
        missing = [f"{folder.name}/{name} is missing" for name in names if not (folder / name).is_file()]
        files = tuple(folder / name for name in names)
        damaged = [] if missing else [problem for file in files if (problem := _damage(file))]
        if not missing and not damaged:
            return Weights(folder=folder, variant=variant, files=files, dtype=_stored_dtype(files)), []
        problems += missing + damaged
    if problems:
        return None, problems
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLE_SUFFIXES)
    if pickles:
        refused = f"{folder.name}/{pickles[0]} is a pickle, which can run code and is refused"
        return None, [f"{refused} ({folder.name}/{stem}.safetensors is needed)"]
    return None, [f"{folder.name}/{stem}.safetensors is missing"]


def _weight_sets(folder: Path, stem: str) -> list[tuple[str | None, list[str]]]:
    """Return (variant, file names) of every set of weights that the folder holds or an index names, plain first.

    `STEM.safetensors`, `STEM.VARIANT.safetensors`, and the sharded `STEM.safetensors.index.json` and
    `STEM.safetensors.index.VARIANT.json`, whose index names the shards.
    """
    sets: dict[str | None, list[str]] = {}
    for file in sorted(folder.glob(f"{stem}*.safetensors")):
        variant = file.name[len(stem) : -len(".safetensors")]
        if variant == "" or (variant.startswith(".") and "-of-" not in variant):
            sets[variant[1:] or None] = [file.name]
    for index in sorted(folder.glob(f"{stem}.safetensors.index*.json")):
        variant = index.name[len(f"{stem}.safetensors.index") : -len(".json")]
        shards: object = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelFolderError(f"{index} names no weight files", "download the file again")
        names = cast("dict[str, object]", shards).values()
        sets.setdefault(variant[1:] or None, sorted({Path(str(name)).name for name in names}))
    return sorted(sets.items(), key=lambda item: item[0] or "")


def _damage(file: Path) -> str | None:
    try:
        with _open(file) as tensors:
            return None if tensors.keys() else f"{file.parent.name}/{file.name} holds no tensors"
    except (SafetensorError, OSError) as error:
        return f"{file.parent.name}/{file.name} is damaged ({error})"


def _open(file: Path) -> Any:
    """Return a safetensors file as a context; its header is read and checked against the file's length."""
    return safe_open(file, framework="pt")


def _stored_dtype(files: tuple[Path, ...]) -> torch.dtype:
    """Return the floating dtype of most tensors."""
    counts: Counter[str] = Counter()
    for file in files:
        with _open(file) as tensors:
            counts.update(str(tensors.get_slice(key).get_dtype()) for key in tensors.keys())  # noqa: SIM118
    known = [name for name, _ in counts.most_common() if name in _DTYPES]
    return _DTYPES[known[0]] if known else torch.float32


def load_diffusers(cls: Any, weights: Weights) -> nn.Module:
    """Load a diffusers model into host RAM in its stored dtype. Raises `ModelFolderError` if that fails."""
    return _load(cls, weights, torch_dtype=weights.dtype)


def load_transformers(cls: Any, weights: Weights) -> nn.Module:
    """Load a transformers model likewise."""
    return _load(cls, weights, dtype=weights.dtype)


def load_tokenizer(cls: Any, folder: Path) -> Any:
    """Load a transformers tokenizer of class `cls`. Raises `ModelFolderError` if its files cannot be read."""
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    # For a damaged vocabulary the tokenizers library raises plain `Exception`.
    except Exception as error:
        raise ModelFolderError(
            f"the tokenizer in {folder} cannot be read ({error})", "download its files again"
        ) from error


def _load(cls: Any, weights: Weights, **dtype: torch.dtype) -> nn.Module:
    try:
        module, info = cls.from_pretrained(
            str(weights.folder),
            variant=weights.variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **dtype,
        )
    # A config with wrong values can make a model fail with errors of any kind.
    except Exception as error:
        raise ModelFolderError(
            f"{weights.folder} does not load as {cls.__name__} ({error})",
            "check that config and weights belong together",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelFolderError(
            f"{weights.folder} lacks {len(missing)} weights of {cls.__name__}, such as {missing[0]}",
            "check that config and weights belong together",
        )
    return module.requires_grad_(False).eval()
