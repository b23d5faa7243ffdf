"""Settings from the command line: `training.batch_size=4`."""

from __future__ import annotations

import itertools
import os
import tomllib
from pathlib import Path
from typing import Any

from aquatint.config.describe import all_keys, generic, suggest
from aquatint.config.parse import COMMAND_LINE, Source
from aquatint.config.positions import KeyPath, key_of, path_of
from aquatint.config.words import find_setting, suggestion_hint
from aquatint.errors import Problem


def apply_override(source: Source, token: str) -> Problem | None:
    """Puts one override into the source's values. Returns what is wrong with it, if anything."""
    key, equals, text = token.partition("=")
    path = path_of(key.strip())
    if not equals or not key.strip():
        return _problem(f"`{token}` is not a setting", "write overrides as `section.setting=value`")
    if not _is_text(token):
        return _problem(f"`{key}` is not UTF-8 text", "rename the file or folder with plain letters")
    if not _is_known(path):
        return _problem(f"unknown setting `{key.strip()}`", suggestion_hint(suggest(key.strip(), all_keys())))
    try:
        _assign(source.data, path, _value(path, text))
    except _CannotAssign as error:
        return _problem(f"cannot set `{key}`: {error}", "set the whole list, or an index that it has")
    except tomllib.TOMLDecodeError:
        hint = 'write lists as ["a", "b"], with the whole override in single quotes so that the shell leaves it alone'
        return _problem(f"cannot read the value of `{token}`", hint)
    source.override(path)
    return None


def from_folder(folder: Path, path: Path) -> Path:
    """An absolute path, counted from `folder`. `..` and `~` are worked out, links stay."""
    return Path(os.path.normpath(Path.cwd() / folder / path.expanduser()))


def _problem(message: str, hint: str) -> Problem:
    return Problem(message, hint, COMMAND_LINE)


class _CannotAssign(Exception):
    pass


def _is_text(token: str) -> bool:
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_known(path: KeyPath) -> bool:
    """Also an entry of a list of plain values, such as `samples.prompts.0`, is known."""
    key = generic(key_of(path))
    return key in all_keys() or (isinstance(path[-1], int) and generic(key_of(path[:-1])) in all_keys())


def _value(path: KeyPath, text: str) -> Any:
    """TOML where it is TOML, else plain text; settings that are texts need no quotes. `null` is no value."""
    setting = find_setting(generic(key_of(path)))
    if text == "null":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if text[:1] in ("[", "{") and not (setting and setting.is_text):
            raise
        value = text
    if setting and setting.is_text and not isinstance(value, str):
        value = text
    if setting and setting.is_path and isinstance(value, str):
        value = str(from_folder(Path(), Path(value)))
    return value


def _assign(data: Any, path: KeyPath, value: Any) -> None:
    for part, after in itertools.pairwise(path):
        data = _enter(data, part, [] if isinstance(after, int) else {})
    _enter(data, path[-1], value)
    data[path[-1]] = value


def _enter(data: Any, part: str | int, default: Any) -> Any:
    """What `data` holds at `part`, after adding `default` if it holds nothing there."""
    if isinstance(data, dict) and isinstance(part, str):
        if part not in data or not isinstance(data[part], type(default)):
            data[part] = default
        return data[part]
    if not isinstance(data, list) or not isinstance(part, int):
        raise _CannotAssign(f"`{part}` is not in a list" if isinstance(part, int) else "it is an entry of a list")
    if part > len(data):
        raise _CannotAssign(f"the list has {len(data)} entries, counted from 0")
    if part == len(data):
        data.append(default)
    return data[part]
