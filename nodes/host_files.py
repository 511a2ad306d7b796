"""Files of ComfyUI: its folders, how it names files, and the metadata it stores in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
from comfy.cli_args import args

from ..i2v_core.errors import BadInputError, FileError, ModelFolderError
from ..i2v_core.families import WeightFiles
from ..i2v_core.families.tensor_file import SUFFIXES
from ..i2v_core.files import file_errors, with_date
from ..i2v_core.latent_file import SUFFIX as LATENT_SUFFIX

DEMO_LATENT = "demo (bundled)"
_DEMO_LATENT_FILE = Path(__file__).parent.parent / "assets" / "demo_latent.latent"
# Control characters and lone surrogates, which file systems reject.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPath:
    """A new file in the host's output folder; `subfolder` is relative to that folder, as the page expects it."""

    path: Path
    subfolder: str

    @property
    def name(self) -> str:
        """Return the path relative to the output folder, for people."""
        return f"{self.subfolder}/{self.path.name}".lstrip("/")

    def as_result(self) -> dict[str, str]:
        """Return the file in the form that the page expects."""
        return {"filename": self.path.name, "subfolder": self.subfolder, "type": "output"}


def check_prefix(prefix: object, input_name: str = "filename_prefix") -> None:
    """Raise `BadInputError` unless the prefix is a name within the output folder."""
    if not isinstance(prefix, str):
        raise BadInputError(f"{prefix} is not a valid {input_name}: it is not text", "write for example video/i2v")
    root = Path(folder_paths.get_output_directory()).resolve()
    printable = _UNPRINTABLE.sub("", prefix)
    if printable != prefix or not prefix.strip() or Path(prefix).name in {"", ".."}:
        raise BadInputError(f"'{printable}' is not a valid {input_name}", "write for example video/i2v")
    if not (root / prefix).resolve().is_relative_to(root):
        raise BadInputError(
            f"the {input_name} '{prefix}' leads out of the output folder {root}",
            "use a name within it, with subfolders if you like, such as video/i2v",
        )


def new_output(prefix: str, suffix: str, width_pixels: int = 0, height_pixels: int = 0) -> OutputPath:
    """Return the next free name for a prefix, numbered as the host numbers its own files.

    Raises:
        BadInputError: the prefix is not a valid name, or leads out of the output folder.
        FileError: its folder cannot be created.
    """
    dated = with_date(prefix, datetime.now().astimezone())
    check_prefix(dated)
    root = folder_paths.get_output_directory()
    with file_errors(Path(root) / dated):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(dated, root, width_pixels, height_pixels)
    return OutputPath(path=Path(folder) / f"{name}_{counter:05}_{suffix}", subfolder=subfolder)


def output_folder(name: str) -> Path:
    """Return a folder within the host's output folder, which may not exist yet; raise `BadInputError` for any other."""
    check_prefix(name, "output_folder")
    return Path(folder_paths.get_output_directory()).resolve() / name


def input_path(name: object, input_name: str) -> Path:
    """Return a file or folder in the host's input folder, or in its output folder if the name ends in ` [output]`.

    Raises:
        BadInputError: it lies elsewhere, or does not exist.
    """
    path = _inside(name) if isinstance(name, str) and not _UNPRINTABLE.search(name) else None
    if path is None:
        raise BadInputError(
            f"{input_name} is '{_UNPRINTABLE.sub('', str(name))}', which is not in ComfyUI's input folder",
            f"put it into {folder_paths.get_input_directory()} and use its path relative to that folder",
        )
    if not os.path.exists(path):  # unlike pathlib's, it returns False for a name that is too long
        raise BadInputError(f"{input_name}: {path} does not exist", "check the name")
    return path


def check_readable(image: Path) -> None:
    """Raise `BadInputError` for an image outside the host's input and output folders."""
    if viewable(image) is None:
        raise BadInputError(
            f"the image {image} is outside ComfyUI's input folder",
            f"put it into {folder_paths.get_input_directory()}",
        )


def viewable(path: Path) -> dict[str, str] | None:
    """Return the query of a file for `/view`; None unless it is in the host's output or input folder."""
    for kind in ("output", "input"):
        root = Path(folder_paths.get_directory_by_type(kind)).resolve()
        if path.resolve().is_relative_to(root):
            subfolder = path.resolve().relative_to(root).parent
            return {"filename": path.name, "subfolder": subfolder.as_posix().strip("."), "type": kind}
    return None


def workflow_metadata(hidden: Any) -> dict[str, str]:
    """Return prompt and workflow as JSON texts to store in a file; empty if the host was started with that off."""
    if args.disable_metadata:
        return {}
    found: Mapping[str, Any] = hidden.extra_pnginfo or {}
    if hidden.prompt is not None:
        found = {"prompt": hidden.prompt, **found}
    return {name: json.dumps(value) for name, value in found.items()}


def frame_progress(total_frames: int) -> Callable[[int], None]:
    """Return a callback for the number of frames done: it moves the progress bar, and raises if interrupted."""
    bar = comfy.utils.ProgressBar(total_frames)

    def update(done_frames: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done_frames, total_frames)

    return update


def latent_names() -> list[str]:
    """List the bundled latent and every latent file in the host's output and input folders, newest first."""
    found: dict[str, float] = {}
    for root, mark in ((folder_paths.get_output_directory(), " [output]"), (folder_paths.get_input_directory(), "")):
        for folder, _, files in os.walk(root):
            for path in (Path(folder) / file for file in files if file.endswith(LATENT_SUFFIX)):
                with suppress(FileNotFoundError):  # a broken link
                    found[path.relative_to(root).as_posix() + mark] = path.stat().st_mtime
    return [DEMO_LATENT, *sorted(found, key=lambda name: -found[name])]


def latent_path(name: object) -> Path:
    """Return the file of a name in `latent_names`; other nodes and scripts may pass any value.

    Raises:
        BadInputError: the name is not of a latent file in those folders.
        FileError: the file does not exist.
    """
    if name == DEMO_LATENT:
        return _DEMO_LATENT_FILE
    path = _inside(name) if isinstance(name, str) and not _UNPRINTABLE.search(name) else None
    if path is None or path.suffix != LATENT_SUFFIX:
        raise BadInputError(
            f"'{name}' is not a {LATENT_SUFFIX} file in ComfyUI's input or output folder",
            "choose one from the list in I2V Load Latent",
        )
    if not os.path.isfile(path):  # unlike pathlib's, it returns False for a name that is too long
        raise FileError(
            f"{path} does not exist", "choose another file in I2V Load Latent; press R on the page to see new files"
        )
    return path


FROM_FOLDER = "from the model's folder"


def weight_files() -> dict[str, Path]:
    """Return every GGUF and safetensors file in the host's diffusion model folders, by its relative path."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths("diffusion_models"):
        for folder, _, files in os.walk(root, followlinks=True):
            for path in (Path(folder) / file for file in files if Path(file).suffix.lower() in SUFFIXES):
                found.setdefault(path.relative_to(root).as_posix(), path)
    return dict(sorted(found.items()))


def chosen_files(transformer_file: object, low_noise_file: object) -> WeightFiles:
    """Return the files chosen in I2V Loader, by the component whose weights they hold.

    Raises:
        ModelFolderError: a name is not in `weight_files`.
        BadInputError: by their names, the two files are swapped.
    """
    chosen = {"transformer": transformer_file, "transformer_2": low_noise_file}
    files = {component: _weight_file(name) for component, name in chosen.items() if name != FROM_FOLDER}
    if len(files) == 2 and "low" in str(transformer_file).lower() and "high" in str(low_noise_file).lower():
        raise BadInputError(
            f"by their names, {transformer_file} is the low-noise expert and {low_noise_file} the high-noise one",
            "swap transformer_file and low_noise_file in I2V Loader",
        )
    return files


def _weight_file(name: object) -> Path:
    files = weight_files()
    if not isinstance(name, str) or name not in files:
        raise ModelFolderError(
            f"there is no weight file '{name}'",
            "choose one from the list in I2V Loader; press R on the page to see new files",
        )
    return files[name]


def _inside(name: str) -> Path | None:
    """Return the path of a file by the host's name for it, or None if it leads out of the host's folders."""
    plain, root = folder_paths.annotated_filepath(name)
    root = Path(root or folder_paths.get_input_directory()).resolve()
    path = root / plain
    return path if path.resolve().is_relative_to(root) else None
