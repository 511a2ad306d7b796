"""The adapter's part for files: where ComfyUI keeps them, how it names them, and what it stores in them."""

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
# Control characters, and halves of characters, which no file system takes.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPath:
    """A new name in the host's output folder. `subfolder` is where it is in there, as the page asks for it."""

    path: Path
    subfolder: str

    @property
    def name(self) -> str:
        """As people read it: from the output folder on."""
        return f"{self.subfolder}/{self.path.name}".lstrip("/")

    def as_result(self) -> dict[str, str]:
        """As the page takes a file."""
        return {"filename": self.path.name, "subfolder": self.subfolder, "type": "output"}


def check_prefix(prefix: object, what: str = "a filename_prefix") -> None:
    """Raise `BadInputError` unless the prefix is a name within the output folder. `what` it is, for the message."""
    if not isinstance(prefix, str):
        raise BadInputError(f"{what} of {prefix} is no text", "write for example video/i2v")
    root = Path(folder_paths.get_output_directory()).resolve()
    printable = _UNPRINTABLE.sub("", prefix)
    if printable != prefix or not prefix.strip() or Path(prefix).name in {"", ".."}:
        raise BadInputError(f"{what} of '{printable}' is no name", "write for example video/i2v")
    if not (root / prefix).resolve().is_relative_to(root):
        raise BadInputError(
            f"{what} of '{prefix}' leads out of the output folder {root}",
            "use a name, with folders before it if you like, such as video/i2v",
        )


def new_output(prefix: str, suffix: str, width_pixels: int = 0, height_pixels: int = 0) -> OutputPath:
    """The next free name for a prefix, numbered as the host numbers its own files.

    Raises:
        BadInputError: the prefix is no name, or leads out of the output folder.
        FileError: its folder cannot be made.
    """
    dated = with_date(prefix, datetime.now().astimezone())
    check_prefix(dated)
    root = folder_paths.get_output_directory()
    with file_errors(Path(root) / dated):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(dated, root, width_pixels, height_pixels)
    return OutputPath(path=Path(folder) / f"{name}_{counter:05}_{suffix}", subfolder=subfolder)


def output_folder(name: str) -> Path:
    """A folder in the host's output folder, which need not be there yet. Raises `BadInputError` for any other."""
    check_prefix(name, "an output_folder")
    return Path(folder_paths.get_output_directory()).resolve() / name


def input_path(name: object, input_name: str) -> Path:
    """A file or folder in the host's input folder, or with ` [output]` after its name in the output folder.

    Raises:
        BadInputError: it lies elsewhere, or there is none.
    """
    path = _inside(name) if isinstance(name, str) and not _UNPRINTABLE.search(name) else None
    if path is None:
        raise BadInputError(
            f"{input_name} is '{_UNPRINTABLE.sub('', str(name))}', which is no place in ComfyUI's input folder",
            f"put it into {folder_paths.get_input_directory()} and give its place in there",
        )
    if not os.path.exists(path):  # unlike pathlib's it takes a name too long for a file for one that is not there
        raise BadInputError(f"{input_name}: there is no {path}", "check the name")
    return path


def check_readable(picture: Path) -> None:
    """Raise `BadInputError` for a picture outside of the host's input and output folders."""
    if viewable(picture) is None:
        raise BadInputError(
            f"the picture {picture} lies outside of ComfyUI's input folder",
            f"put it into {folder_paths.get_input_directory()}",
        )


def viewable(path: Path) -> dict[str, str] | None:
    """A file as the page asks for it at `/view`; None unless it lies in the host's output or input folder."""
    for kind in ("output", "input"):
        root = Path(folder_paths.get_directory_by_type(kind)).resolve()
        if path.resolve().is_relative_to(root):
            subfolder = path.resolve().relative_to(root).parent
            return {"filename": path.name, "subfolder": subfolder.as_posix().strip("."), "type": kind}
    return None


def workflow_metadata(hidden: Any) -> dict[str, str]:
    """The prompt and the workflow as texts, for a file; none where the host was started not to store them."""
    if args.disable_metadata:
        return {}
    found: Mapping[str, Any] = hidden.extra_pnginfo or {}
    if hidden.prompt is not None:
        found = {"prompt": hidden.prompt, **found}
    return {name: json.dumps(value) for name, value in found.items()}


def frame_progress(total_frames: int) -> Callable[[int], None]:
    """Called with the number of frames done, moves the node's progress bar; raises when the user has interrupted."""
    bar = comfy.utils.ProgressBar(total_frames)

    def update(done_frames: int) -> None:
        management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done_frames, total_frames)

    return update


def latent_names() -> list[str]:
    """The bundled latent, and every latent file in the host's output and input folders, the newest first."""
    found: dict[str, float] = {}
    for root, mark in ((folder_paths.get_output_directory(), " [output]"), (folder_paths.get_input_directory(), "")):
        for folder, _, files in os.walk(root):
            for path in (Path(folder) / file for file in files if file.endswith(LATENT_SUFFIX)):
                with suppress(FileNotFoundError):  # a link that leads nowhere
                    found[path.relative_to(root).as_posix() + mark] = path.stat().st_mtime
    return [DEMO_LATENT, *sorted(found, key=lambda name: -found[name])]


def latent_path(name: object) -> Path:
    """The file that a name in `latent_names` means; other nodes and scripts may give anything for a name.

    Raises:
        BadInputError: the name leads elsewhere than to a latent file in those folders.
        FileError: there is no such file.
    """
    if name == DEMO_LATENT:
        return _DEMO_LATENT_FILE
    path = _inside(name) if isinstance(name, str) and not _UNPRINTABLE.search(name) else None
    if path is None or path.suffix != LATENT_SUFFIX:
        raise BadInputError(
            f"'{name}' is no {LATENT_SUFFIX} file in ComfyUI's input or output folder",
            "choose one from the list in I2V Load Latent",
        )
    if not os.path.isfile(path):  # unlike pathlib's it takes a name too long for a file for one that is not there
        raise FileError(
            f"there is no file {path}", "choose another in I2V Load Latent; press R on the page to see new files"
        )
    return path


FROM_FOLDER = "from the model's folder"


def weight_files() -> dict[str, Path]:
    """Every GGUF and safetensors file below the host's folders of diffusion models, by its place in there."""
    found: dict[str, Path] = {}
    for root in folder_paths.get_folder_paths("diffusion_models"):
        for folder, _, files in os.walk(root, followlinks=True):
            for path in (Path(folder) / file for file in files if Path(file).suffix.lower() in SUFFIXES):
                found.setdefault(path.relative_to(root).as_posix(), path)
    return dict(sorted(found.items()))


def chosen_files(transformer_file: object, low_noise_file: object) -> WeightFiles:
    """The files that I2V Loader's widgets name, by the component whose weights they are.

    Raises:
        ModelFolderError: a name that is not in `weight_files`.
        BadInputError: by their names the two are each other's.
    """
    chosen = {"transformer": transformer_file, "transformer_2": low_noise_file}
    files = {component: _weight_file(name) for component, name in chosen.items() if name != FROM_FOLDER}
    if len(files) == 2 and "low" in str(transformer_file).lower() and "high" in str(low_noise_file).lower():
        raise BadInputError(
            f"by their names, {transformer_file} is of the low-noise expert and {low_noise_file} of the high-noise one",
            "exchange transformer_file and low_noise_file in I2V Loader",
        )
    return files


def _weight_file(name: object) -> Path:
    files = weight_files()
    if not isinstance(name, str) or name not in files:
        raise ModelFolderError(
            f"there is no file '{name}' of weights",
            "choose one from the list in I2V Loader; press R on the page to see new files",
        )
    return files[name]


def _inside(name: str) -> Path | None:
    """The path that the host's name for a file means, or None if it leads out of the host's folders."""
    plain, root = folder_paths.annotated_filepath(name)
    root = Path(root or folder_paths.get_input_directory()).resolve()
    path = root / plain
    return path if path.resolve().is_relative_to(root) else None
