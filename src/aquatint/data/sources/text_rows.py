"""Rows of tables that are text, one at a time and within limits: JSON Lines, CSV, and the JSON of sd-scripts.

Bytes that are not UTF-8 come out as half characters, so that only the cells that are used have to be UTF-8.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

Row: TypeAlias = "tuple[int, dict[str, Any] | str]"  # line or entry, from 1; and its cells, or the reason why it cannot be read

MAX_ROW_BYTES = 1 << 20  # sixteen of the longest captions
KEY = ""  # the column that has the keys of a JSON object of pictures
_TOO_LONG = f"is longer than {MAX_ROW_BYTES:,} bytes"


class BadTable(Exception):
    """A table that cannot be read on from here. The text is the reason, and reads well after the file's name."""


@dataclass(frozen=True)
class _BadObject:
    """Stands for an object that cannot be used."""

    reason: str


def read_json_lines(file: BinaryIO) -> Iterator[Row]:
    """One object per line; blank lines are no rows. Raises BadTable for UTF-16."""
    for number, line in _lines(file):
        if line is None:
            yield number, _TOO_LONG
        elif stripped := line.strip():
            yield number, _parse_line(stripped)


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        text = line.decode("utf-8", "surrogateescape")
        value, end = _DECODER.raw_decode(text)
    except (RecursionError, ValueError) as error:
        return _reason(error)
    return _row(value) if end == len(text) else "is not JSON: it goes on after its end"


def _row(value: Any) -> dict[str, Any] | str:
    if isinstance(value, dict | _BadObject):
        return value if isinstance(value, dict) else value.reason
    return f"is {kind_of(value)}, where an object belongs"


def read_csv(file: BinaryIO, delimiter: str = "") -> Iterator[Row]:
    """Rows of CSV (RFC 4180), with cells by the names in its first line; without a delimiter, that line tells which it is.

    The number is that of a row's first line. Raises BadTable for UTF-16, and for a first line without names.
    """
    too_long: list[int] = []
    lines = _csv_lines(file, too_long)
    first = next(lines, "")
    delimiter = delimiter or max(",;\t", key=first.count)
    try:
        names = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
    except csv.Error as error:
        raise BadTable(f"has a first line that is not CSV: {error}") from error
    if not any(names):
        raise BadTable("has no names of columns in its first line")
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadTable(f"has two columns of the name {twice[0][:200]!r}")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    for number, cells in _csv_rows(reader):
        while too_long:
            yield too_long.pop(0), _TOO_LONG
        if isinstance(cells, str):
            yield number, cells
        elif len(cells) == len(names):
            yield number, dict(zip(names, cells, strict=True))
        elif cells:
            yield number, f"has {len(cells)} cell{'s' if len(cells) != 1 else ''}, and the first line {len(names)}"
    for number in too_long:
        yield number, _TOO_LONG


def _csv_rows(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """Rows as they were split, with the number of their first line, when the reader began with the second."""
    while True:
        number = reader.line_num + 2
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # the reader goes on behind the lines that it has taken
            last = reader.line_num + 1
            yield number, f"is not CSV{f', up to line {last}' if last > number else ''}: {error}"


def _csv_lines(file: BinaryIO, too_long: list[int]) -> Iterator[str]:
    """Lines as text. One that is too long is noted, and blank, which is no row."""
    for number, line in _lines(file):
        if line is None:
            too_long.append(number)
        yield "" if line is None else line.decode("utf-8", "surrogateescape")


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Lines from 1 without a byte order mark; None for one that is too long, which is skipped."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise BadTable("is in UTF-16; save it as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MAX_ROW_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_ROW_BYTES)
            yield number, None
        else:
            yield number, line


def read_json(file: BinaryIO) -> Iterator[Row]:
    """Entries of one JSON value: a list of objects, or an object of pictures as sd-scripts writes it.

    The latter's keys are in the column KEY; an entry that is no object is a caption, or a list of captions. Only one
    entry at a time is in memory, and the keys. Raises BadTable where the text is broken: nothing can be found behind that.
    """
    window = _Window(file)
    try:
        opening = window.take()
        if opening not in ("[", "{"):
            raise BadTable(f"is not a table: it begins with {opening[:1]!r}, and not with an object or a list")
        yield from (_entries(window) if opening == "{" else _items(window))
        if window.peek():
            raise BadTable(
                f"goes on after the end of its {'object' if opening == '{' else 'list'} (byte {window.offset}); "
                "if each line is an object of its own, name it .jsonl"
            )
    except (RecursionError, ValueError) as error:
        raise BadTable(f"{_reason(error)} (after byte {window.offset})") from error


def _items(window: _Window) -> Iterator[Row]:
    number, closed = 0, window.skip("]")
    while not closed:
        number += 1
        yield number, _row(window.value())
        closed = window.closes("]")


def _entries(window: _Window) -> Iterator[Row]:
    seen: set[str] = set()
    number, closed = 0, window.skip("}")
    while not closed:
        number += 1
        key = window.value()
        if not isinstance(key, str):
            raise BadTable(f"is not JSON: after byte {window.offset}, a name in quotes belongs")
        if window.take() != ":":
            raise BadTable(f"is not JSON: after byte {window.offset}, a colon belongs")
        value = window.value()
        if key in seen:
            yield number, f"has the same name as an earlier one: {key[:200]!r}"
        elif isinstance(value, _BadObject):
            yield number, value.reason
        else:
            yield number, {**(value if isinstance(value, dict) else {"caption": value}), KEY: key}
        seen.add(key)
        closed = window.closes("}")


class _Window:
    """A part of a long JSON text, moved along as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._position = 0
        self._ended = False
        self._bytes_read = 0

    @property
    def offset(self) -> int:
        """About where in the file this is, in bytes."""
        return max(0, self._bytes_read - len(self._text[self._position :].encode("utf-8", "surrogatepass")))

    def peek(self) -> str:
        """The next letter that is not blank; empty at the end."""
        while True:
            while self._position < len(self._text):
                letter = self._text[self._position]
                if letter not in " \t\n\r":
                    return letter
                self._position += 1
            if not self._fill(MAX_ROW_BYTES):
                return ""

    def take(self) -> str:
        letter = self.peek()
        self._position += len(letter)
        return letter

    def skip(self, letter: str) -> bool:
        """Whether this letter is next; if so, it is passed."""
        found = self.peek() == letter
        self._position += found
        return found

    def closes(self, end: str) -> bool:
        """After an entry: whether `end` follows it, and not a comma and another one."""
        letter = self.take()
        if letter not in (end, ",") or not letter:
            raise BadTable(f"is not JSON: after byte {self.offset}, a comma or `{end}` belongs" if letter else "breaks off before its end")
        return letter == end

    def value(self) -> Any:
        """The next value, or a _BadObject in its place. Raises JSONDecodeError or BadTable if there is none that fits the limit."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
                if end < len(self._text) or self._ended:  # else a number might go on
                    self._position = end
                    return value
            except json.JSONDecodeError:
                if self._ended:
                    if self.peek() == "":
                        raise BadTable("breaks off before its end") from None
                    raise
            if len(self._text) - self._position > MAX_ROW_BYTES:
                raise BadTable(f"has an entry that is broken, or longer than {MAX_ROW_BYTES:,} bytes, after byte {self.offset}")
            self._fill(max(MAX_ROW_BYTES, len(self._text) - self._position))

    def _fill(self, num_bytes: int) -> bool:
        data = b"" if self._ended else self._file.read(num_bytes)
        if not self._bytes_read and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise BadTable("is in UTF-16; save it as UTF-8")
        self._ended = not data
        self._bytes_read += len(data)
        self._text = self._text[self._position :] + self._decoder.decode(data, final=self._ended)
        self._position = 0
        return not self._ended


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object; of one with a name that stands twice, what is wrong with it."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        return _BadObject(f"has {twice[:200]!r} twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]}"
    return f"has a value that cannot be read: {error}"


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")
