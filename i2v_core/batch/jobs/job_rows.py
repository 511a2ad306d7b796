"""The rows of a CSV or JSON Lines file, each with its line, as values by column; or what is wrong with the row."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, cast

from ...errors import BadInputError
from ...families import VideoSize

Value = str | int | float | bool

_UTF8 = "save the list as UTF-8"
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The values that a row gives; those left out or empty are not in it."""

    line: int
    values: dict[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """What is wrong with a row."""

    line: int
    problem: str
    remedy: str


class RowProblemError(Exception):
    """Problem and remedy."""


def read_csv(content: bytes, columns: tuple[str, ...]) -> Iterator[Row | RowError]:
    """Rows below a header; the delimiter is a comma. Raises `BadInputError` for a header that cannot be."""
    reader = csv.reader(StringIO(_decoded(content), newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(reader)]
    except csv.Error as error:
        raise BadInputError(f"the header cannot be read ({error})", "check its quotation marks") from error
    _check_header(header, columns)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
            if cells is None:
                return
            if any(cell.strip() for cell in cells):
                yield Row(line=line, values=_csv_values(header, cells))
        except csv.Error as error:
            yield RowError(line=line, problem=f"the row cannot be read ({error})", remedy="check its quotation marks")
        except RowProblemError as error:
            yield RowError(line=line, problem=error.args[0], remedy=error.args[1])


def _csv_values(header: Sequence[str], cells: Sequence[str]) -> dict[str, Value]:
    if len(cells) > len(header):
        raise RowProblemError(
            f"it has {len(cells)} cells for {len(header)} columns",
            "put a cell with a comma into quotation marks",
        )
    values: dict[str, Value] = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()}
    _check_encoding(values)
    return values


def _check_header(header: Sequence[str], columns: tuple[str, ...]) -> None:
    if not any(header):
        raise BadInputError("the list has no header", f"begin it with a line such as {','.join(columns[:4])}")
    _check_names(header, columns, BadInputError)


def _check_names(names: Sequence[str], columns: tuple[str, ...], error: type[Exception]) -> None:
    unknown = [name for name in names if name not in columns]
    if unknown:
        separator = " (the separator is a comma)" if any(mark in unknown[0] for mark in ";\t") else ""
        named = ", ".join(f"'{_readable(name)}'" for name in unknown)
        raise error(f"there is no column {named}{separator}", f"use {', '.join(columns)}")
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise error(f"{', '.join(doubled)} is there more than once", "leave one of them")


def read_json_lines(content: bytes, columns: tuple[str, ...]) -> Iterator[Row | RowError]:
    """One JSON object a line; empty lines are left out."""
    for line, text in enumerate(_decoded(content).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            yield Row(line=line, values=_json_values(text, columns))
        except RowProblemError as error:
            yield RowError(line=line, problem=error.args[0], remedy=error.args[1])


def _json_values(text: str, columns: tuple[str, ...]) -> dict[str, Value]:
    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([name for name, _ in found], columns, RowProblemError)
        return dict(found)

    try:
        parsed: Any = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise RowProblemError(f"it is no JSON ({error})", 'write an object such as {"image": "a.png"}') from error
    if not isinstance(parsed, dict):
        raise RowProblemError("it is no JSON object", 'write an object such as {"image": "a.png"}')
    values = {name: it for name, it in cast("dict[str, Any]", parsed).items() if it is not None and it != ""}
    for name, value in values.items():
        if not isinstance(value, (str, int, float)):
            raise RowProblemError(f"the {name} is {json.dumps(value)[:80]}", "give a text or a number")
    _check_encoding(values)
    return values


def _decoded(content: bytes) -> str:
    """The text; what is no UTF-8 is kept as half characters, so that it spoils no other row than its own."""
    if content.startswith(_OTHER_MARKS):
        raise BadInputError("the list is in UTF-16 or UTF-32", _UTF8)
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise BadInputError("the list is empty", "give a row for each video")
    return content.decode("utf-8-sig", "surrogateescape")


def _check_encoding(values: dict[str, Value]) -> None:
    for name, value in values.items():
        if isinstance(value, str) and not _is_text(value):
            raise RowProblemError(f"the {name} is no UTF-8 ('{_readable(value)}')", _UTF8)


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _readable(value: str) -> str:
    return value.encode("utf-8", "replace").decode("utf-8")[:80]


_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")
_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[x×*]\s*([0-9]{1,6})(?:\s*[x×*]\s*([0-9]{1,6}))?\s*", re.IGNORECASE)
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def text(name: str, value: Value) -> str:
    if not isinstance(value, str):
        raise BadInputError(f"the {name} is {value}, which is no text", "write it in quotation marks")
    return value


def whole_number(name: str, value: Value) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value)
    raise BadInputError(f"the {name} is '{value}', which is no whole number", "write for example 16")


def number(name: str, value: Value) -> float:
    """A finite number."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadInputError(f"the {name} is '{value}', which is no finite number", "write for example 7.5")
    return found


def flag(name: str, value: Value) -> bool:
    found = _FLAGS.get(str(value).strip().lower())
    if found is None:
        raise BadInputError(f"the {name} is '{value}'", "write true or false")
    return found


def size(value: Value, default_frames: int) -> VideoSize:
    """Of `512x320` or `512x320x16`."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise BadInputError(f"the size is '{value}', which is none", "write width x height, such as 512x320")
    width, height, frames = match.groups()
    return VideoSize(
        width_pixels=int(width), height_pixels=int(height), frames=default_frames if frames is None else int(frames)
    )
