"""Writing files atomically, dates in their names, and system errors with remedies."""

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
    errno.ENOTDIR: ("a part of the path is not a folder", _ELSEWHERE),
    errno.EEXIST: ("something else has that name", _ELSEWHERE),
    errno.ENOTEMPTY: ("something else has that name", _ELSEWHERE),
    errno.EISDIR: ("a folder has that name", _ELSEWHERE),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter name"),
    errno.EINVAL: ("the system does not allow that name", _ELSEWHERE),
}
"""Causes and remedies of common system errors."""


_DATE = re.compile(r"%date(?::([^%]*))?%")
_DATE_FIELD = re.compile(r"yyyy|yy|MM?|dd?|hh?|mm?|ss?")


def with_date(text: str, now: datetime) -> str:
    """Return `text` with `%date%` replaced by a date such as 2031-07-09, and `%date:FORMAT%` by one in that format.

    Fields are those of the host's page: yyyy, yy, MM, M, dd, d, hh, h (of 24), mm, m, ss, s.
    """
    numbers = {"M": now.month, "d": now.day, "h": now.hour, "m": now.minute, "s": now.second}

    def field(match: re.Match[str]) -> str:
        name = match[0]
        return f"{now.year:04}"[-len(name) :] if name[0] == "y" else f"{numbers[name[0]]:0{len(name)}}"

    return _DATE.sub(lambda match: _DATE_FIELD.sub(field, match[1] or "yyyy-MM-dd"), text)


@contextmanager
def file_errors(path: Path) -> Generator[None]:
    """Turn a system error of the body into a `FileError` that names `path`, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        cause, remedy = _ERRORS.get(error.errno or 0, (str(error), "look at what the system says of the file"))
        raise FileError(f"{path} cannot be written: {cause}", remedy) from error


@contextmanager
def atomic_file(path: Path) -> Generator[Path]:
    """Yield a temporary path beside `path` for a file or a folder, which is renamed to `path` when the body ends.

    If the body fails, the temporary file is removed. A missing parent folder is created.

    Raises:
        FileError: the folder cannot be written to, or the name cannot be used.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)  # fails now, not after minutes of work, if nothing can be written
        temporary.unlink()
        with suppress(FileNotFoundError):
            path.lstat()  # likewise, if the name cannot be used
    try:
        yield temporary
        with file_errors(path):
            os.replace(temporary, path)
    finally:
        _remove(temporary)


def set_aside(path: Path) -> None:
    """Rename a file that cannot be used to end in `.broken`, so that it is neither read again nor lost."""
    try:
        path.replace(path.with_suffix(".broken"))
    except OSError as error:
        logger.warning("%s cannot be moved: %s", path, error)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
