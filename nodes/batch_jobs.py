"""What the inputs of I2V Batch ask for: a job for each video, and the rows that cannot run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..i2v_core.batch.jobs.job import JobRecord, JobSpec, JobState
from ..i2v_core.batch.jobs.job_file import BadRow, JobList, ListedJob, picture_digest, read_job_list
from ..i2v_core.errors import BadInputError
from ..i2v_core.families import FamilyFacts
from ..i2v_core.families.pictures import first_picture
from ..i2v_core.files import atomic_file, file_errors
from . import host, host_files

LISTS = (".csv", ".jsonl", ".ndjson")
_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def check_sources(jobs: str | None, *, has_images: bool) -> None:
    """Raise `BadInputError` unless either `jobs` names what is there, or there are images. None: not known yet."""
    if jobs is None:
        return
    if bool(jobs.strip()) == has_images:
        found = "both jobs and images are" if has_images else "neither jobs nor images are"
        raise BadInputError(
            f"what to make is not clear: {found} given",
            "write the name of a list or folder into jobs, or leave jobs empty and connect images",
        )
    if not has_images:
        _list_in(host_files.input_path(jobs.strip(), "jobs"))


def jobs_of(jobs: str, images_FHWC: Tensor | None, prompts: str, defaults: JobSpec, facts: FamilyFacts) -> JobList:
    """Every job that is asked for.

    Raises:
        BadInputError: the list or folder as a whole cannot be used, or no row of it.
        FileError: pictures from the graph cannot be kept.
    """
    check_sources(jobs, has_images=images_FHWC is not None)
    if images_FHWC is not None:
        found = _of_pictures(list(_kept(images_FHWC)), prompts, defaults)
    else:
        place = host_files.input_path(jobs.strip(), "jobs")
        listed = _list_in(place)
        if listed is None:
            found = _of_pictures(_pictures_in(place), prompts, defaults)
        else:
            found = _inside(read_job_list(listed, defaults, facts))
    if not found.jobs:
        raise BadInputError("no row can run:\n" + "\n".join(map(str, found.bad)), "mend the rows")
    return found


def _list_in(place: Path) -> Path | None:
    """The list that a place is or holds; None for a folder of pictures."""
    if not place.is_dir():
        if place.suffix.lower() not in LISTS:
            raise BadInputError(
                f"jobs: {place} is no list", f"give a folder, or a file that ends in {', '.join(LISTS)}"
            )
        return place
    lists = sorted(it for it in place.iterdir() if it.suffix.lower() in LISTS)
    if len(lists) > 1:
        names = ", ".join(it.name for it in lists)
        raise BadInputError(f"jobs: there are several lists in {place}: {names}", "name one of them")
    if not lists and not _pictures_in(place):
        raise BadInputError(f"jobs: there are no pictures in {place}", f"use {', '.join(_PICTURES)}")
    return lists[0] if lists else None


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(it for it in folder.iterdir() if it.suffix.lower() in _PICTURES)


def _inside(found: JobList) -> JobList:
    """With jobs whose picture lies outside of the host's folders among the bad rows."""
    jobs: list[ListedJob] = []
    bad = list(found.bad)
    for job in found.jobs:
        try:
            host_files.check_readable(job.spec.image)
        except BadInputError as error:
            bad.append(BadRow(line=job.line, problem=error.problem, remedy=error.remedy))
        else:
            jobs.append(job)
    return JobList(tuple(jobs), tuple(sorted(bad, key=lambda it: it.line)))


def _of_pictures(pictures: list[Path], prompts: str, defaults: JobSpec) -> JobList:
    """A job for each picture, which counts as a row."""
    jobs: list[ListedJob] = []
    bad: list[BadRow] = []
    rows: dict[str, int] = {}
    for row, (picture, prompt) in enumerate(_pairs(pictures, prompts), start=1):
        try:
            text = _text_beside(picture, prompt)
            spec = replace(defaults, image=picture, prompt=text, image_digest=picture_digest(picture))
            first = rows.setdefault(spec.key, row)
            if first != row:
                raise BadInputError(f"{picture.name} asks for the same video as row {first}", "remove one of them")
        except BadInputError as error:
            bad.append(BadRow(line=row, problem=error.problem, remedy=error.remedy))
        else:
            jobs.append(ListedJob(line=row, spec=spec))
    return JobList(tuple(jobs), tuple(bad))


def _pairs(pictures: list[Path], prompts: str) -> Iterable[tuple[Path, str]]:
    """One line is for all pictures, one picture for all lines; otherwise there is a line for each."""
    lines = [line.strip() for line in prompts.strip().split("\n")]
    count = max(len(pictures), len(lines))
    if {len(pictures), len(lines)} - {1, count}:
        raise BadInputError(
            f"there are {len(lines)} prompts for {len(pictures)} pictures", "write one line, or one for each picture"
        )
    return zip(pictures * (count // len(pictures)), lines * (count // len(lines)), strict=True)


def _text_beside(picture: Path, otherwise: str) -> str:
    """What the text file of a picture's name says."""
    file = picture.with_suffix(".txt")
    if not file.is_file():
        return otherwise
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"the prompt in {file} cannot be read ({error})", "save it as UTF-8") from error


def _kept(images_FHWC: Tensor) -> Iterator[Path]:
    """Each picture as a file named after its pixels, since the jobs may run long after this prompt."""
    folder = host.pictures_folder()
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for image_HWC in images_FHWC:
        picture = first_picture(image_HWC[None])
        name = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()[:12]
        path = folder / f"image_{name}.png"
        if not path.is_file():
            with atomic_file(path) as temporary, file_errors(path):
                picture.save(temporary, format="PNG")
        yield path


def forget_pictures(records: Iterable[JobRecord]) -> None:
    """Removes those from the graph whose videos are there."""
    for record in records:
        picture = record.spec.image
        if record.state is JobState.DONE and picture.parent == host.pictures_folder():
            picture.unlink(missing_ok=True)
