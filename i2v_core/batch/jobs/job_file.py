"""Reads a list of jobs, CSV or JSON Lines, and checks all of it before anything starts.

A row that cannot run is reported with its line, the problem and a remedy; the others can run without it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ...errors import BadInputError, I2VError
from ...families import FamilyFacts, VideoSize
from .job import JobSpec
from .job_rows import Row, RowError, Value, read_csv, read_json_lines

COLUMNS = (
    "image",
    "prompt",
    "negative",
    "seed",
    "size",
    "frames",
    "steps",
    "cfg",
    "fps",
    "motion_bucket",
    "noise_augmentation",
    "priority",
    "scheduler",
    "precision",
    "allow_approximate",
    "format",
    "quality",
)
_READERS: dict[str, Callable[[bytes, tuple[str, ...]], Iterator[Row | RowError]]] = {
    ".csv": read_csv,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
}
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,20}")
_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[x×*]\s*([0-9]{1,6})(?:\s*[x×*]\s*([0-9]{1,6}))?\s*", re.IGNORECASE)
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedJob:
    """A job that can run, and its line in the list."""

    line: int
    spec: JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A row that cannot run."""

    line: int
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}. Remedy: {self.remedy}."


@dataclass(frozen=True, slots=True)
class JobList:
    """All rows of a list in its order, each either a job or an error."""

    jobs: tuple[ListedJob, ...]
    bad: tuple[BadRow, ...]


def read_job_list(path: Path, defaults: JobSpec, facts: FamilyFacts) -> JobList:
    """Read all rows of a list; paths in it are relative to its folder.

    Args:
        path: a `.csv`, or a `.jsonl` with one object a line.
        defaults: values of columns that are left out or empty, and the model.
        facts: facts of the model's family, which limit the sizes.

    Raises:
        BadInputError: the list itself cannot be read: missing, empty, in another encoding, or with unknown, repeated or
            missing columns.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInputError(f"{path} is not a list of jobs", "give a .csv or a .jsonl file")
    jobs: list[ListedJob] = []
    bad: list[BadRow] = []
    first_lines: dict[str, int] = {}
    for row in reader(_content(path), COLUMNS):
        try:
            if isinstance(row, RowError):
                raise BadInputError(row.problem, row.remedy)
            spec = _spec(row, path.parent, defaults, facts)
            first_line = first_lines.setdefault(spec.key, row.line)
            if first_line != row.line:
                raise BadInputError(
                    f"the row asks for the same video as line {first_line}", "remove it, or give it another seed"
                )
        except I2VError as error:
            bad.append(BadRow(line=row.line, problem=error.problem, remedy=error.remedy))
        else:
            jobs.append(ListedJob(line=row.line, spec=spec))
    if not jobs and not bad:
        raise BadInputError(f"{path} lists no jobs", "give a row for each video")
    return JobList(tuple(jobs), tuple(bad))


def picture_digest(image: Path) -> str:
    """Hash of a picture's content, which has been decoded to its end.

    Raises:
        BadInputError: the file is missing, not a picture, damaged, or too large.
    """
    remedy = "give the path of a picture, relative to the list's folder"
    try:
        status = image.stat()
        return _digest(image, status.st_size, status.st_mtime_ns)
    except UnidentifiedImageError as error:
        raise BadInputError(f"{image} is not a picture", remedy) from error
    except Image.DecompressionBombError as error:
        raise BadInputError(f"{image} is too large ({error})", "make it smaller") from error
    # Pillow raises OSError, SyntaxError or ValueError for damaged files; a path with a NUL character is a ValueError.
    except (OSError, SyntaxError, ValueError) as error:
        cause = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise BadInputError(f"the picture {image} cannot be read: {cause}", remedy) from error


@lru_cache(maxsize=4096)
def _digest(image: Path, size_bytes: int, changed_ns: int) -> str:  # noqa: ARG001
    opened: Any = Image.open(image)
    with opened as picture:
        picture.load()
    return hashlib.sha256(image.read_bytes()).hexdigest()[:32]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInputError(
            f"the list {path} cannot be read: {error.strerror or error}", "give the path of a .csv or .jsonl file"
        ) from error


def _spec(row: Row, folder: Path, defaults: JobSpec, facts: FamilyFacts) -> JobSpec:
    values = row.values
    required = ["image", "prompt"] if "text" in facts.optional_inputs else ["image"]
    missing = [name for name in required if name not in values]
    if missing:
        raise BadInputError(f"there is no {' and no '.join(missing)}", f"give {' and '.join(required)} in every row")
    size = _size(values["size"], defaults.size.frames) if "size" in values else defaults.size
    if "frames" in values:
        size = replace(size, frames=_whole_number("frames", values["frames"]))
    facts.check(size)
    image = folder / _text("image", values["image"])
    options: dict[str, Any] = {name: parse(name, values[name]) for name, parse in _OPTIONS.items() if name in values}
    facts.scheduler(options.get("scheduler", defaults.scheduler))
    return replace(defaults, image=image, size=size, image_digest=picture_digest(image), **options)


def _text(name: str, value: Value) -> str:
    if not isinstance(value, str):
        raise BadInputError(f"the {name} is {value}, which is not a text", "write it in quotation marks")
    return value


def _whole_number(name: str, value: Value) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _WHOLE_NUMBER.fullmatch(value.strip()):
        return int(value)
    raise BadInputError(f"the {name} is '{value}', which is not a whole number", "write for example 16")


def _number(name: str, value: Value) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadInputError(f"the {name} is '{value}', which is not a finite number", "write for example 7.5")
    return number


def _flag(name: str, value: Value) -> bool:
    flag = _FLAGS.get(str(value).strip().lower())
    if flag is None:
        raise BadInputError(f"the {name} is '{value}'", "write true or false")
    return flag


def _size(value: Value, default_frames: int) -> VideoSize:
    """Size written as `512x320` or, with frames, `512x320x16`."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise BadInputError(f"'{value}' is not a valid size", "write width x height, such as 512x320")
    width, height, frames = match.groups()
    return VideoSize(
        width_pixels=int(width), height_pixels=int(height), frames=default_frames if frames is None else int(frames)
    )


_OPTIONS: dict[str, Callable[[str, Value], Value]] = {
    "prompt": _text,
    "negative": _text,
    "seed": _whole_number,
    "steps": _whole_number,
    "cfg": _number,
    "fps": _number,
    "motion_bucket": _whole_number,
    "noise_augmentation": _number,
    "priority": _number,
    "scheduler": _text,
    "precision": _text,
    "allow_approximate": _flag,
    "format": _text,
    "quality": _whole_number,
}
"""Parsers of the columns that a row may leave out."""
