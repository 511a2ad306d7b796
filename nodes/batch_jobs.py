"""Turns the inputs of I2V Batch into a job per video, and lists the rows that cannot run."""

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
_IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def check_sources(jobs: str | None, *, has_images: bool) -> None:
    """Raise `BadInputError` unless there is either an existing list or folder, or images. None: not known yet."""
    if jobs is None:
        return
    if bool(jobs.strip()) == has_images:
        found = "both jobs and images are" if has_images else "neither jobs nor images are"
        raise BadInputError(
            f"the source of the jobs is ambiguous: {found} given",
            "write the name of a list or folder into jobs, or leave jobs empty and connect images",
        )
    if not has_images:
        _find_list(host_files.input_path(jobs.strip(), "jobs"))


def jobs_of(jobs: str, images_FHWC: Tensor | None, prompts: str, defaults: JobSpec, facts: FamilyFacts) -> JobList:
    """Return every job that the inputs ask for, and the rows that cannot run.

    Raises:
        BadInputError: the list or folder cannot be used at all, or none of its rows can run.
        FileError: images from the graph cannot be saved.
    """
    check_sources(jobs, has_images=images_FHWC is not None)
    if images_FHWC is not None:
        found = _image_jobs(list(_saved_images(images_FHWC)), prompts, defaults)
    else:
        place = host_files.input_path(jobs.strip(), "jobs")
        list_file = _find_list(place)
        if list_file is None:
            found = _image_jobs(_images_in(place), prompts, defaults)
        else:
            found = _readable_jobs(read_job_list(list_file, defaults, facts))
    if not found.jobs:
        raise BadInputError("no row can run:\n" + "\n".join(map(str, found.bad)), "fix the rows listed above")
    return found


def _find_list(place: Path) -> Path | None:
    """Return the list file at `place` or in it; None for a folder of images."""
    if not place.is_dir():
        if place.suffix.lower() not in LISTS:
            raise BadInputError(
                f"jobs: {place} is not a list", f"use a folder, or a file that ends in {', '.join(LISTS)}"
            )
        return place
    lists = sorted(it for it in place.iterdir() if it.suffix.lower() in LISTS)
    if len(lists) > 1:
        names = ", ".join(it.name for it in lists)
        raise BadInputError(f"jobs: {place} holds several lists: {names}", "name one of them")
    if not lists and not _images_in(place):
        raise BadInputError(f"jobs: there are no images in {place}", f"supported are {', '.join(_IMAGES)}")
    return lists[0] if lists else None


def _images_in(folder: Path) -> list[Path]:
    return sorted(it for it in folder.iterdir() if it.suffix.lower() in _IMAGES)


def _readable_jobs(found: JobList) -> JobList:
    """Move jobs whose image lies outside the host's folders to the bad rows."""
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


def _image_jobs(images: list[Path], prompts: str, defaults: JobSpec) -> JobList:
    """Make a job for each image and prompt; its number is its row."""
    jobs: list[ListedJob] = []
    bad: list[BadRow] = []
    rows: dict[str, int] = {}
    for row, (image, prompt) in enumerate(_pairs(images, prompts), start=1):
        try:
            text = _prompt_of(image, prompt)
            spec = replace(defaults, image=image, prompt=text, image_digest=picture_digest(image))
            first = rows.setdefault(spec.key, row)
            if first != row:
                raise BadInputError(f"{image.name} asks for the same video as row {first}", "remove one of them")
        except BadInputError as error:
            bad.append(BadRow(line=row, problem=error.problem, remedy=error.remedy))
        else:
            jobs.append(ListedJob(line=row, spec=spec))
    return JobList(tuple(jobs), tuple(bad))


def _pairs(images: list[Path], prompts: str) -> Iterable[tuple[Path, str]]:
    """Pair images with prompts: one line serves all images, one image takes all lines, else one line per image."""
    lines = [line.strip() for line in prompts.strip().split("\n")]
    count = max(len(images), len(lines))
    if {len(images), len(lines)} - {1, count}:
        raise BadInputError(
            f"there are {len(lines)} prompts for {len(images)} images", "write one line, or one line per image"
        )
    return zip(images * (count // len(images)), lines * (count // len(lines)), strict=True)


def _prompt_of(image: Path, default: str) -> str:
    """Return the content of the text file with the image's name, or `default` if there is none."""
    file = image.with_suffix(".txt")
    if not file.is_file():
        return default
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"the prompt in {file} cannot be read ({error})", "save it as UTF-8") from error


def _saved_images(images_FHWC: Tensor) -> Iterator[Path]:
    """Save each image to a file named after its pixels, since its job may run long after this prompt."""
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


def delete_used_images(records: Iterable[JobRecord]) -> None:
    """Delete the saved images of jobs that are done."""
    for record in records:
        image = record.spec.image
        if record.state is JobState.DONE and image.parent == host.pictures_folder():
            image.unlink(missing_ok=True)
