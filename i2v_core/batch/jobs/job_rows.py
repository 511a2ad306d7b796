"""Rows of a CSV or JSON Lines file with their line numbers: values by column, or the error of the row."""

from __future__ import annotations

import codecs
import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, cast

from ...errors import BadInputError

Value = str | int | float | bool

_SAVE_AS_UTF8 = "save the list as UTF-8"
_OTHER_BYTE_ORDER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Values of a row, without those that are left out or empty."""

    line: int
    values: dict[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """A row that cannot be read, and the remedy."""

    line: int
    problem: str
    remedy: str


class _RowProblemError(Exception):
    """Problem and remedy."""


def read_csv(content: bytes, columns: tuple[str, ...]) -> Iterator[Row | RowError]:
    """Read rows below a header; the delimiter is a comma.

    Raises:
        BadInputError: the header is missing or damaged, or names unknown columns.
    """
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
        except _RowProblemError as error:
            yield RowError(line=line, problem=error.args[0], remedy=error.args[1])


def read_json_lines(content: bytes, columns: tuple[str, ...]) -> Iterator[Row | RowError]:
    """Read one JSON object from each line; empty lines are skipped."""
    for line, text in enumerate(_decoded(content).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            yield Row(line=line, values=_json_values(text, columns))
        except _RowProblemError as error:
            yield RowError(line=line, problem=error.args[0], remedy=error.args[1])


def _csv_values(header: Sequence[str], cells: Sequence[str]) -> dict[str, Value]:
    if len(cells) > len(header):
        raise _RowProblemError(
            f"the row has {len(cells)} cells for {len(header)} columns",
            "put a cell with a comma into quotation marks",
        )
    values: dict[str, Value] = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()}
    _check_encoding(values)
    return values


def _json_values(text: str, columns: tuple[str, ...]) -> dict[str, Value]:
    def checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_names([name for name, _ in pairs], columns, _RowProblemError)
        return dict(pairs)

    remedy = 'write an object such as {"image": "a.png"}'
    try:
        parsed: Any = json.loads(text, object_pairs_hook=checked_object)
    except (ValueError, RecursionError) as error:
        raise _RowProblemError(f"the line is not JSON ({error})", remedy) from error
    if not isinstance(parsed, dict):
        raise _RowProblemError("the line is not a JSON object", remedy)
    values = {name: it for name, it in cast("dict[str, Any]", parsed).items() if it is not None and it != ""}
    for name, value in values.items():
        if not isinstance(value, (str, int, float)):
            raise _RowProblemError(f"the {name} is {json.dumps(value)[:80]}", "give a text or a number")
    _check_encoding(values)
    return values


def _check_header(header: Sequence[str], columns: tuple[str, ...]) -> None:
    if not any(header):
        raise BadInputError("the list has no header", f"begin it with a line such as {','.join(columns[:4])}")
    _check_names(header, columns, BadInputError)


def _check_names(names: Sequence[str], columns: tuple[str, ...], error_type: type[Exception]) -> None:
    unknown = [name for name in names if name not in columns]
    if unknown:
        hint = " (the separator is a comma)" if any(mark in unknown[0] for mark in ";\t") else ""
        quoted = ", ".join(f"'{_printable(name)}'" for name in unknown)
        raise error_type(f"there is no column {quoted}{hint}", f"use {', '.join(columns)}")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise error_type(f"{', '.join(repeated)} is there more than once", "remove the repeated column")


def _decoded(content: bytes) -> str:
    """The text; bytes that are not UTF-8 become surrogates, so that they spoil only the row that they are in."""
    if content.startswith(_OTHER_BYTE_ORDER_MARKS):
        raise BadInputError("the list is in UTF-16 or UTF-32", _SAVE_AS_UTF8)
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise BadInputError("the list is empty", "give a row for each video")
    return content.decode("utf-8-sig", "surrogateescape")


def _check_encoding(values: dict[str, Value]) -> None:
    for name, value in values.items():
        if isinstance(value, str) and not _is_utf8(value):
            raise _RowProblemError(f"the {name} is not UTF-8 ('{_printable(value)}')", _SAVE_AS_UTF8)


def _is_utf8(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _printable(value: str) -> str:
    return value.encode("utf-8", "replace").decode("utf-8")[:80]
