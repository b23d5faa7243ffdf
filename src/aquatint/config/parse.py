"""Config files as plain values, with the place of every key: TOML, JSON, YAML 1.2."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aquatint.config.positions import KeyPath, Lines, json_lines, toml_lines
from aquatint.errors import ConfigError, Problem, StorageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_YAML_VALUES = 100_000  # a few lines of YAML can stand for billions of values
COMMAND_LINE = "the command line"


@dataclass
class Source:
    """The values of a config as they were written, and where: in `file` at `lines`, or on the command line."""

    file: str
    data: dict[str, Any]
    lines: Lines
    overridden: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath) -> str:
        """`file, line N` of the innermost part of `path` that was written somewhere; just the file if none was."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overridden:
                return COMMAND_LINE
            if path[:length] in self.lines:
                return f"{self.file}, line {self.lines[path[:length]]}"
        return self.file

    def override(self, path: KeyPath) -> None:
        """What stands at `path`, and all in it, is from the command line now."""
        size = len(path)
        self.lines = {other: line for other, line in self.lines.items() if other[:size] != path}
        self.overridden.add(path)

    def rename(self, old: KeyPath, new: KeyPath) -> None:
        """Everything noted under `old` is noted under `new`."""
        size = len(old)
        self.lines = {new + path[size:] if path[:size] == old else path: line for path, line in self.lines.items()}
        self.overridden = {new + path[size:] if path[:size] == old else path for path in self.overridden}


def read_source(path: Path) -> Source:
    """Reads a config file; of a run folder, its `config.json`. Raises ConfigError with the one reason why it cannot be read."""
    path = path / "config.json" if path.is_dir() else path
    readers: dict[str, Callable[[str], tuple[Any, Lines]]] = {".toml": _toml, ".json": _json, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix.lower() not in readers:
        raise _refuse(f"{path} is not a config file", "use a file that ends in .toml, .json, .yaml or .yml")
    text = _read_text(path)
    try:
        data, lines = readers[path.suffix.lower()](text)
    except _SyntaxProblem as error:
        raise _refuse(error.message, error.hint, f"{path}, line {error.line}" if error.line else str(path)) from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:  # a whole number of thousands of digits
        raise _refuse(f"{path} holds a value that is not usable: {error}", "write an ordinary number") from error
    if not isinstance(data, dict):
        raise _refuse(f"{path} holds no settings", "write sections with settings in them; `aquatint init` shows how")
    return Source(str(path), data, lines)


class _SyntaxProblem(Exception):
    def __init__(self, message: str, hint: str, line: int | None) -> None:
        super().__init__(message)
        self.message, self.hint, self.line = message, hint, line


def _too_deep(path: Path) -> ConfigError:
    return _refuse(f"{path} is nested too deeply", "a config has tables in tables, but not dozens of them")


def _check_depth(value: Any, left: int = MAX_DEPTH) -> None:
    """Raises RecursionError if tables or lists lie deeper in each other than any config needs."""
    if left == 0:
        raise RecursionError
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(child, left - 1)


def _refuse(message: str, hint: str, where: str = "") -> ConfigError:
    return ConfigError([Problem(message, hint, where)])


def _read_text(path: Path) -> str:
    if not path.exists():
        raise _refuse(f"there is no config file {path}", "`aquatint init run.toml` writes one")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(f"could not read {path}: {error.strerror}", hint="check the file's permissions and its disk") from error
    if len(data) > MAX_BYTES:
        raise _refuse(f"{path} has more than {MAX_BYTES} bytes", "this does not look like a config: check the file's name")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        hint = "save it as UTF-8 in your editor (Save as…, Encoding)"
        raise _refuse("a character that is not UTF-8 text", hint, f"{path}, line {line}") from error


def _toml(text: str) -> tuple[dict[str, Any], Lines]:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"^(.*) \(at (?:line (\d+), column \d+|end of document)\)$", str(error), re.DOTALL)
        line = int(found[2]) if found and found[2] else text.count("\n") + 1
        raise _SyntaxProblem(f"broken TOML ({found[1] if found else error})", _toml_hint(text, line), line) from error
    _check_depth(data)
    return data, toml_lines(text)


def _toml_hint(text: str, line: int) -> str:
    """What to do about a line that is not TOML: the three mistakes that people make most."""
    content = text.split("\n")[line - 1] if line else ""
    value = content.partition("=")[2].strip()
    if '"' in value and "\\" in value:
        return f"write paths with backslashes in single quotes: {value.replace(chr(34), chr(39))}"
    if value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return "write `true` or `false`, in small letters"
    if re.match(r"[A-Za-z./~]|\d+ +[a-z]", value):
        return f'write text in quotes: "{value}"'
    return "compare the line with the file that `aquatint init` writes; a name may stand only once in its section"


def _json(text: str) -> tuple[Any, Lines]:
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        hint = 'JSON wants "double quotes" around names and texts, a comma between settings and none after the last'
        raise _SyntaxProblem(f"broken JSON ({error.msg})", hint, error.lineno) from error
    except _Duplicate as error:
        line = _last_line_with(text, error.name)
        raise _SyntaxProblem(f"`{error.name}` stands twice in its section", "keep one of the two", line) from error
    _check_depth(data)
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _SyntaxProblem("half a character, such as \\ud800", "write the character itself", None) from error
    return data, json_lines(text)


class _Duplicate(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise _Duplicate(name)
        values[name] = value
    return values


def _last_line_with(text: str, name: str) -> int | None:
    position = text.rfind(json.dumps(name, ensure_ascii=False))
    return text.count("\n", 0, position) + 1 if position >= 0 else None


def _no_constant(name: str) -> Any:
    raise _SyntaxProblem(f"{name} is not a number that a setting can have", "write an ordinary number", None)


def _yaml(text: str) -> tuple[Any, Lines]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    reader = YAML(typ="rt", pure=True)
    reader.version = (1, 2)
    try:
        _check_yaml_depth(text)
        root = reader.load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else None
        problem = (error.problem or "").partition("\n")[0]
        hint = "check the indentation (spaces, no tabs), and put texts with a colon in quotes; a name may stand only once in its section"
        raise _SyntaxProblem(f"broken YAML ({problem})", hint, line) from error
    except (YAMLError, ValueError) as error:
        raise _SyntaxProblem(f"broken YAML ({str(error).partition(chr(10))[0]})", "write it as plain text in UTF-8", None) from error
    lines: Lines = {}
    return {} if root is None else _plain(root, (), lines, [MAX_YAML_VALUES]), lines


def _check_yaml_depth(text: str) -> None:
    """As `_check_depth`, before ruamel builds anything: it needs seconds to give up on deep nesting."""
    from ruamel.yaml import YAML
    from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecursionError


def _plain(node: Any, path: KeyPath, lines: Lines, left: list[int]) -> Any:
    """Ruamel's values as plain ones. `left[0]` is how many more there may be."""
    left[0] -= 1
    if len(path) > MAX_DEPTH:  # an alias can lie inside what it stands for
        raise RecursionError
    if left[0] < 0:
        raise _SyntaxProblem("too many values", "write them out instead of repeating them with anchors (&) and aliases (*)", None)
    if isinstance(node, dict):
        marks = node.lc.data or {}  # type: ignore[attr-defined]
        for key in node:
            if key in marks:
                lines[(*path, str(key))] = marks[key][0] + 1
        return {str(key): _plain(value, (*path, str(key)), lines, left) for key, value in node.items()}
    if isinstance(node, list):
        marks = node.lc.data or {}  # type: ignore[attr-defined]
        for index in marks:
            lines[(*path, index)] = marks[index][0] + 1
        return [_plain(value, (*path, index), lines, left) for index, value in enumerate(node)]
    return _plain_scalar(node)


def _plain_scalar(value: Any) -> Any:
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else str(value)
