"""Reading a list of jobs: CSV or JSON Lines, checked whole before anything starts.

A row that cannot run is named with its line, what is wrong and what to do; the others can run without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ...errors import BadInputError, I2VError
from ...families import FamilyFacts
from .job import JobSpec
from .job_rows import Row, RowError, Value, flag, number, read_csv, read_json_lines, size, text, whole_number

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


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedJob:
    """A job that can run, and the line of the list that asks for it."""

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
    """Every row of a list, either as a job or as what is wrong with it; in the list's order."""

    jobs: tuple[ListedJob, ...]
    bad: tuple[BadRow, ...]


def read_job_list(path: Path, defaults: JobSpec, facts: FamilyFacts) -> JobList:
    """All rows of a list; paths in it are relative to its folder.

    Args:
        path: a `.csv`, or a `.jsonl` with one object a line.
        defaults: the values of columns that are left out or empty, the model included.
        facts: of the model's family, which says what sizes there are.

    Raises:
        BadInputError: the list itself cannot be read: missing, empty, in another encoding, or with columns that are
            unknown, doubled or missing.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInputError(f"{path} is no list of jobs", "give a .csv or a .jsonl file")
    jobs: list[ListedJob] = []
    bad: list[BadRow] = []
    lines: dict[str, int] = {}
    for row in reader(_read(path), COLUMNS):
        try:
            if isinstance(row, RowError):
                raise BadInputError(row.problem, row.remedy)
            spec = _spec(row, path.parent, defaults, facts)
            first_line = lines.setdefault(spec.key, row.line)
            if first_line != row.line:
                raise BadInputError(
                    f"it asks for the same video as line {first_line}", "remove it, or give it another seed"
                )
        except I2VError as error:
            bad.append(BadRow(line=row.line, problem=error.problem, remedy=error.remedy))
        else:
            jobs.append(ListedJob(line=row.line, spec=spec))
    if not jobs and not bad:
        raise BadInputError(f"{path} lists no jobs", "give a row for each video")
    return JobList(tuple(jobs), tuple(bad))


def _read(path: Path) -> bytes:
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
    wanted = size(values["size"], defaults.size.frames) if "size" in values else defaults.size
    if "frames" in values:
        wanted = replace(wanted, frames=whole_number("frames", values["frames"]))
    facts.check(wanted)
    image = folder / text("image", values["image"])
    others: dict[str, Any] = {name: read(name, values[name]) for name, read in _OTHERS.items() if name in values}
    facts.scheduler(others.get("scheduler", defaults.scheduler))
    return replace(defaults, image=image, size=wanted, image_digest=picture_digest(image), **others)


_OTHERS: dict[str, Callable[[str, Value], Value]] = {
    "prompt": text,
    "negative": text,
    "seed": whole_number,
    "steps": whole_number,
    "cfg": number,
    "fps": number,
    "motion_bucket": whole_number,
    "noise_augmentation": number,
    "priority": number,
    "scheduler": text,
    "precision": text,
    "allow_approximate": flag,
    "format": text,
    "quality": whole_number,
}


@lru_cache(maxsize=4096)
def _digest(image: Path, size_bytes: int, changed_ns: int) -> str:  # noqa: ARG001
    opened: Any = Image.open(image)
    with opened as picture:
        picture.load()
    return hashlib.sha256(image.read_bytes()).hexdigest()[:32]


def picture_digest(image: Path) -> str:
    """A name for a picture's content, which has been read to its end.

    Raises:
        BadInputError: there is no such file, or it is no picture, damaged, or too large to be one.
    """
    remedy = "give the path of a picture, relative to the list's folder"
    try:
        found = image.stat()
        return _digest(image, found.st_size, found.st_mtime_ns)
    except UnidentifiedImageError as error:
        raise BadInputError(f"{image} is no picture", remedy) from error
    except Image.DecompressionBombError as error:
        raise BadInputError(f"{image} is too large ({error})", "make it smaller") from error
    # Of damaged files Pillow raises OSError, SyntaxError or ValueError; a path of NUL characters is a ValueError too.
    except (OSError, SyntaxError, ValueError) as error:
        cause = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise BadInputError(f"the picture {image} cannot be read: {cause}", remedy) from error
