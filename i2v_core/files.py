"""Files that are there whole or not at all; their names, and what the system says of them in words to act on."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from .errors import FileError

logger = logging.getLogger(__name__)

_ELSEWHERE = "choose another name or folder"
_FREE_SPACE = "free some space there and run again"

_ERRORS = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("your share of the disk is full", _FREE_SPACE),
    errno.EFBIG: ("the file grew larger than the system allows", "make it smaller, or raise the limit"),
    errno.EACCES: ("permission is denied", "allow writing there, or choose another folder"),
    errno.EPERM: ("permission is denied", "allow writing there, or choose another folder"),
    errno.EROFS: ("the disk is read-only", _ELSEWHERE),
    errno.ENOENT: ("the folder is not there", _ELSEWHERE),
    errno.ENOTDIR: ("a part of the path is no folder", _ELSEWHERE),
    errno.EEXIST: ("something else has that name", _ELSEWHERE),
    errno.ENOTEMPTY: ("something else has that name", _ELSEWHERE),
    errno.EISDIR: ("a folder has that name", _ELSEWHERE),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.EINVAL: ("the system does not allow that name", _ELSEWHERE),
}
"""What the usual system errors mean, and what to do."""


_DATE = re.compile(r"%date(?::([^%]*))?%")
_DATE_FIELD = re.compile(r"yyyy|yy|MM?|dd?|hh?|mm?|ss?")


def with_date(text: str, now: datetime) -> str:
    """`text` with every `%date%` as in 2031-07-09, and every `%date:FORMAT%` as its format says.

    Fields are those of the host's page: yyyy, yy, MM, M, dd, d, hh, h (of 24), mm, m, ss, s.
    """
    numbers = {"M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def field(match: re.Match[str]) -> str:
        name = match[0]
        return f"{now.year:04}"[-len(name) :] if name[0] == "y" else f"{numbers[name[0]]:0{len(name)}}"

    return _DATE.sub(lambda match: _DATE_FIELD.sub(field, match[1] or "yyyy-MM-dd"), text)


@contextmanager
def file_errors(path: Path) -> Generator[None]:
    """While the context lasts, a system error becomes a `FileError` that names `path`, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        cause, remedy = _ERRORS.get(error.errno or 0, (str(error), "look at what the system says of the file"))
        raise FileError(f"{path} cannot be written: {cause}", remedy) from error


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """A temporary path beside `path`, for a file or a folder to be made there, which gets its name when it is whole.

    If the body fails, or makes nothing, nothing is left. The folder around it is made where it is missing.

    Raises:
        FileError: the folder cannot be written to, or the name cannot be had.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)  # said now, and not after minutes of work, where nothing can be written
        temporary.unlink()
        with suppress(FileNotFoundError):
            path.lstat()  # likewise, where the name cannot be had
    try:
        yield temporary
        with file_errors(path):
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def set_aside(path: Path) -> None:
    """Gives a file that cannot be used the ending `.broken`, so that it is neither read again nor lost."""
    try:
        path.replace(path.with_suffix(".broken"))
    except OSError as error:
        logger.warning("%s cannot be moved: %s", path, error)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
