"""On which line a setting stands. The standard parsers for TOML and JSON do not say, so the text is scanned once more.

The scanners are only run on text that the real parser has accepted: they look for keys and values and check nothing.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable

KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, int]

_SPACE = re.compile(r"(?:[\s]|#[^\n]*)*")  # white space, line ends and comments
_BLANK = re.compile(r"[ \t]*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}#\n]*")
_STRINGS = {  # opening quotes -> the whole string
    '"""': re.compile(r'"""(?:\\.|[^\\])*?"{3,5}', re.DOTALL),
    "'''": re.compile(r"'''.*?'{3,5}", re.DOTALL),
    '"': re.compile(r'"(?:\\.|[^"\\\n])*"'),
    "'": re.compile(r"'[^'\n]*'"),
}


def path_of(key: str) -> KeyPath:
    """`data.sources.0.path` -> ("data", "sources", 0, "path")."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def key_of(path: KeyPath) -> str:
    """The other way round."""
    return ".".join(map(str, path))


def _line_of(text: str) -> Callable[[int], int]:
    ends = [match.start() for match in re.finditer("\n", text)]
    return lambda position: bisect_left(ends, position) + 1


def toml_lines(text: str) -> Lines:
    """The line (from 1) of every table, key and list entry of a valid TOML text."""
    return _TomlScanner(text.replace("\r\n", "\n")).run()


class _TomlScanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.line_of = _line_of(text)
        self.lines: Lines = {}
        self.table_counts: dict[KeyPath, int] = {}  # path of a list of tables -> tables seen

    def run(self) -> Lines:
        table: KeyPath = ()
        self.skip(_SPACE)
        while self.position < len(self.text):
            if self.text.startswith("[", self.position):
                table = self.header()
            else:
                self.entry(table)
            self.skip(_SPACE)
        return self.lines

    def skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.position)
        assert match is not None
        self.position = match.end()
        return match[0]

    def mark(self, path: KeyPath) -> None:
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], self.line_of(self.position))

    def header(self) -> KeyPath:
        brackets = 2 if self.text.startswith("[[", self.position) else 1
        self.position += brackets
        names = self.dotted_key()
        path: KeyPath = ()
        for name in names[:-1]:
            path = self.latest((*path, name))
        path = (*path, names[-1])
        if brackets == 2:
            self.table_counts[path] = self.table_counts.get(path, 0) + 1
        path = self.latest(path)
        self.mark(path)
        self.position += brackets
        return path

    def latest(self, path: KeyPath) -> KeyPath:
        """The last table so far where `path` is a list of tables."""
        return (*path, self.table_counts[path] - 1) if path in self.table_counts else path

    def dotted_key(self) -> list[str]:
        names = []
        while True:
            self.skip(_BLANK)
            names.append(self.string() if self.text[self.position] in "\"'" else self.skip(_BARE_KEY))
            self.skip(_BLANK)
            if not self.text.startswith(".", self.position):
                return names
            self.position += 1

    def entry(self, table: KeyPath) -> None:
        start = self.position
        path = (*table, *self.dotted_key())
        end, self.position = self.position, start
        self.mark(path)
        self.position = end + 1  # the equals sign
        self.skip(_BLANK)
        self.value(path)

    def value(self, path: KeyPath) -> None:
        opening = self.text[self.position]
        if opening in "\"'":
            self.string()
        elif opening == "[":
            self.items("]", lambda index: self.item((*path, index)))
        elif opening == "{":
            self.items("}", lambda index: self.entry(path))
        else:
            self.skip(_SCALAR)

    def item(self, path: KeyPath) -> None:
        self.mark(path)
        self.value(path)

    def items(self, closing: str, read: Callable[[int], None]) -> None:
        self.position += 1
        index = 0
        self.skip(_SPACE)
        while not self.text.startswith(closing, self.position):
            read(index)
            index += 1
            self.skip(_SPACE)
            if self.text.startswith(",", self.position):
                self.position += 1
                self.skip(_SPACE)
        self.position += 1

    def string(self) -> str:
        quotes = next(quotes for quotes in _STRINGS if self.text.startswith(quotes, self.position))
        token = self.skip(_STRINGS[quotes])
        inner = token[len(quotes) : -len(quotes)]
        return str(json.loads(f'"{inner}"')) if quotes == '"' and _is_json(inner) else inner


def _is_json(inner: str) -> bool:
    try:
        json.loads(f'"{inner}"')
    except ValueError:
        return False
    return True


def json_lines(text: str) -> Lines:
    """The line (from 1) of every key and list entry of a valid JSON text."""
    scanner = _JsonScanner(text)
    scanner.value(scanner.after_space(0), ())
    return scanner.lines


class _JsonScanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.line_of = _line_of(text)
        self.lines: Lines = {}
        self.decode = json.JSONDecoder().raw_decode

    def after_space(self, position: int) -> int:
        while position < len(self.text) and self.text[position] in " \t\r\n":
            position += 1
        return position

    def value(self, position: int, path: KeyPath) -> int:
        """Notes where the parts of the value at `position` stand; returns the position after it."""
        if self.text[position] not in "{[":
            return int(self.decode(self.text, position)[1])
        closing = "}" if self.text[position] == "{" else "]"
        position, index = self.after_space(position + 1), 0
        while self.text[position] != closing:
            key: str | int = index
            line = self.line_of(position)
            if closing == "}":
                key, end = self.decode(self.text, position)
                position = self.after_space(self.after_space(end) + 1)  # over the colon
            self.lines[(*path, key)] = line
            position = self.after_space(self.value(position, (*path, key)))
            if self.text[position] == ",":
                position = self.after_space(position + 1)
            index += 1
        return position + 1
