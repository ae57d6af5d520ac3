"""The rows of a data file, one at a time, each with its place in the file.

Files are JSON (an array, or one object a line), JSON lines, CSV, TSV or Parquet, all but the last also compressed
(``.gz``), or the Arrow files that ``datasets`` saves. None but these is held in memory whole.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from interp.errors import UserError

_CHUNK = 2**20
_PARQUET_ROWS = 8192
_SPACE = re.compile(r"[ \t\r\n]*")
_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)*("?)')


class BadRow(Exception):
    """A row that cannot be read; the message says which field, what was expected and what came."""


Rows = Iterator[tuple[str, object]]


def read_rows(path: str | Path) -> Rows:
    """Read the rows of a file one by one, each with its place, such as ``line 3``; a malformed row is a ``BadRow``.

    Raises:
        UserError: If the ending is not known, or the file cannot be read as what its ending says.
    """
    path = Path(path)
    if (suffix := _suffix(path)) not in _READERS:
        raise UserError(f"{path} has the ending {path.suffix!r}; expected one of {', '.join(_READERS)}.")
    return _READERS[suffix](path)


def data_files(path: str | Path) -> list[Path]:
    """The files of rows that a path names: itself, or those of a folder and of folders in it, by name.

    Raises:
        UserError: If it does not exist, or is a folder without such a file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no {path}; check the path.")
    if not path.is_dir():
        return [path]
    # What `datasets` writes beside its tables.
    about = {"dataset_info.json", "state.json", "dataset_dict.json"}
    found = sorted(f for f in path.rglob("*") if f.is_file() and _suffix(f) in _READERS and f.name not in about)
    if not found:
        raise UserError(f"{path} has no file that ends in one of {', '.join(_READERS)}; give another folder or a file.")
    return found


def _suffix(path: Path) -> str:
    """The ending that tells how a file is read: of a compressed one, what stands before ``.gz``."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in (".json", ".jsonl", ".csv", ".tsv") else Path(name).suffix


@contextmanager
def open_text(path: str | Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text that a person wrote: UTF-8, with or without a byte order mark.

    Raises:
        UserError: If it cannot be read, or is not UTF-8 (the line is named).
    """
    try:
        with _opened(Path(path), newline) as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"Could not read {path}: {reason}; check the path.") from error
    except UnicodeDecodeError as error:
        line = _undecodable_line(Path(path))
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason} in line {line}); convert it or give another file."
        ) from error


def _opened(path: Path, newline: str | None) -> TextIO:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig", newline=newline)
    return path.open(encoding="utf-8-sig", newline=newline)


def _undecodable_line(path: Path) -> int:
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _json_rows(path: Path) -> Rows:
    with open_text(path) as stream:
        while (first := stream.read(1)) and first in " \t\r\n":
            pass
    return _json_array(path) if first == "[" else _json_lines(path)


def _json_lines(path: Path) -> Rows:
    # Only line feeds end a line: JSON texts may contain other line separators of Unicode.
    with open_text(path, newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f"line {number}", BadRow(f"expected one JSON object a line, got invalid JSON ({error})")


def _json_array(path: Path) -> Rows:
    with open_text(path) as stream:
        try:
            for number, item in enumerate(_ArrayReader(stream).items(), 1):
                yield f"item {number}", item
        except (_BrokenJson, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); mend it or give another file.") from error


class _BrokenJson(Exception):
    pass


class _ArrayReader:
    """Parses the items of a JSON array from a window of its text that moves on behind them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._at = 0
        self._lines_before = 0
        self._decode = json.JSONDecoder().raw_decode

    def items(self) -> Iterator[object]:
        self._next_character()
        self._at += 1
        while self._next_character() != "]":
            yield self._item()
            if (mark := self._next_character()) == "]":
                break
            if mark != ",":
                raise self._broken("expected ',' or ']' after an item")
            self._at += 1
            if self._next_character() == "]":
                raise self._broken("expected an item after ','")
        self._at += 1
        if self._next_character():
            raise self._broken("expected nothing after the array")

    def _item(self) -> object:
        while True:
            try:
                item, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._grow():
                    raise self._broken(error.msg, error.pos) from error
            except ValueError as error:
                raise self._broken(str(error)) from error
            else:
                # A number that ends with the window may go on behind it.
                if end < len(self._text) or not self._grow():
                    self._at = min(end, len(self._text))
                    return item

    def _next_character(self) -> str:
        """The next character that is not white space, where the window then starts; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._grow():
                return ""

    def _grow(self) -> bool:
        """Let go of what is parsed and read on, at least as much as is left, so that all is parsed twice at most."""
        more = self._stream.read(max(_CHUNK, len(self._text) - self._at))
        if more:
            self._lines_before += self._text.count("\n", 0, self._at)
            self._text = self._text[self._at :] + more
            self._at = 0
        return bool(more)

    def _broken(self, problem: str, position: int | None = None) -> _BrokenJson:
        before = self._text.count("\n", 0, self._at if position is None else position)
        return _BrokenJson(f"line {self._lines_before + before + 1}: {problem}")


def _separator(path: Path) -> str:
    """What parts the fields of a CSV: a semicolon where the first line has some and no comma, as spreadsheets write it.

    Where the comma is the decimal mark of a language, its spreadsheets do that.
    """
    with open_text(path) as stream:
        first = stream.readline()
    return ";" if ";" in first and "," not in first else ","


def _table_rows(path: Path, delimiter: str) -> Rows:
    header: list[str] | None = None
    for first, last, values in _table_records(path, delimiter):
        if header is None:
            if isinstance(values, BadRow):
                break
            header = values
        elif isinstance(values, BadRow):
            yield f"line {first}", values
        elif len(values) != len(header):
            # Where a quote that is not closed has swallowed rows, the lines tell how many.
            lines = f" in lines {first} to {last}" if last > first else ""
            yield (
                f"line {first}",
                BadRow(f"expected {len(header)} fields as in the first line, got {len(values)}{lines}"),
            )
        else:
            yield f"line {first}", dict(zip(header, values, strict=True))
    if header is None:
        raise UserError(f"{path} should start with a line of field names; give a file that has one.")


def _table_records(path: Path, delimiter: str) -> Iterator[tuple[int, int, list[str] | BadRow]]:
    """The records that are not empty, each with its first and last line."""
    lines: list[str] = []

    def remembered(stream: TextIO) -> Iterator[str]:
        for line in stream:
            lines.append(line)
            yield line

    with open_text(path, newline="") as stream:
        reader = csv.reader(remembered(stream), delimiter=delimiter, strict=True)
        while True:
            first = reader.line_num + 1
            lines.clear()
            # The limit belongs to the process: it is raised for this record only.
            limit = csv.field_size_limit(2**31 - 1)
            try:
                values: list[str] | BadRow = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                offset, closed = _wrong_quote("".join(lines), delimiter)
                if not closed or len(lines) > 1:
                    opened = first + bisect_right(list(itertools.accumulate(map(len, lines))), offset)
                    raise UserError(
                        f'{path}, line {opened}: the quote " that a field starts with there is not closed at its end, '
                        "so the rows after it cannot be told apart; close it, or double quotes within fields."
                    ) from error
                values = BadRow(f"expected a record of quoted and separated fields, got an error ({error})")
            finally:
                csv.field_size_limit(limit)
            if values:
                yield first, reader.line_num, values


def _wrong_quote(record: str, delimiter: str) -> tuple[int, bool]:
    """Where the first field starts whose quotes are wrong, and whether it has a closing quote at all."""
    at = 0
    while at < len(record):
        if field := _QUOTED.match(record, at):
            if not field[1] or record[field.end() : field.end() + 1] not in (delimiter, "\r", "\n", ""):
                return at, bool(field[1])
            at = field.end() + 1
        else:
            at = record.find(delimiter, at) + 1 or len(record)
    return 0, True


def _parquet_rows(path: Path) -> Rows:
    import polars as pl

    number = itertools.count(1)
    try:
        frame = pl.scan_parquet(path, glob=False)
        for start in itertools.count(0, _PARQUET_ROWS):
            part = frame.slice(start, _PARQUET_ROWS).collect()
            for row in part.iter_rows(named=True):
                yield f"row {next(number)}", row
            if len(part) < _PARQUET_ROWS:
                break
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Could not read {path} as Parquet: {reason}; check the path and the file.") from error


def _arrow_rows(path: Path) -> Rows:
    import polars as pl

    try:
        try:
            frame = pl.read_ipc_stream(path)
        except pl.exceptions.PolarsError:
            frame = pl.read_ipc(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Could not read {path} as Arrow: {reason}; check the path and the file.") from error
    for number, row in enumerate(frame.iter_rows(named=True), 1):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json_rows,
    ".jsonl": _json_lines,
    ".csv": lambda path: _table_rows(path, _separator(path)),
    ".tsv": lambda path: _table_rows(path, "\t"),
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
