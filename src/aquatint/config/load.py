"""A config file and `a.b=c` overrides, made into a `Config`. All mistakes are found in one go, each with its place."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aquatint.config import words
from aquatint.config.check import RULES, find
from aquatint.config.describe import OPTIMIZER, all_keys, generic, optimizer_names, optimizers_with, suggest, table
from aquatint.config.overrides import apply_override, from_folder
from aquatint.config.parse import COMMAND_LINE, Source, read_source
from aquatint.config.positions import KeyPath, key_of, path_of
from aquatint.config.schema import Config
from aquatint.config.sections.fields import LOCATION, Section
from aquatint.errors import ConfigError, Problem

_STAND_INS: dict[str, Any] = {  # for required settings that are missing, so that the rest can still be checked
    "model": {"base": "missing"},
    "model.base": "missing",
    "data": {"sources": [{"path": "missing"}]},
    "data.sources": [{"path": "missing"}],
    "data.sources.*": {"path": "missing"},
    "data.sources.*.path": "missing",
    "captions.categories.*": {"tags": ["missing"], "drop_prob": 0.0},
    "captions.categories.*.tags": ["missing"],
    "captions.categories.*.drop_prob": 0.0,
    "training.groups.*": {"match": ["missing"]},
    "training.groups.*.match": ["missing"],
}

_LISTS = ("data.sources", "captions.categories", "training.groups")  # sections that are lists of tables
_MAX_REPAIRS = 10  # rounds; each takes out all wrong values that can be seen, so two or three do


@dataclass(frozen=True)
class Draft:
    """A config and what is wrong with it. The settings in `broken` (dotted keys) have a default or stand-in in `config`."""

    config: Config
    problems: tuple[Problem, ...]
    broken: frozenset[str]
    source: Source

    def place(self, key: str) -> str:
        """Where a setting was written: `file, line N`, `the command line`, or just the file."""
        return self.source.place(path_of(key))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The config in a file (or run folder), with overrides such as `training.batch_size=4`.

    Relative paths in the file start at the file's folder, those in overrides at the current one; the result holds
    absolute ones. Raises ConfigError with all problems.
    """
    draft = read_draft(path, overrides)
    if draft.problems:
        raise ConfigError(draft.problems)
    return draft.config


def collect_problems(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Config | None, list[Problem]]:
    """The config, or None and all that is wrong with it."""
    try:
        draft = read_draft(path, overrides)
    except ConfigError as error:
        return None, list(error.problems)
    return (None if draft.problems else draft.config), list(draft.problems)


def read_draft(path: Path | str, overrides: Sequence[str] = ()) -> Draft:
    """Reads as much as can be read. Raises ConfigError only if the file itself cannot be understood."""
    source = read_source(Path(path))
    report = _Report(source, [problem for token in overrides if (problem := apply_override(source, token))])
    _recognise(source, source.data, (), report)
    _settle_optimizer(source, report)
    config = _absolute(_validate(source, report), Path(source.file).parent)
    for finding in find(RULES, config, report.broken):
        written = [key for key in finding.keys if source.place(path_of(key)) != source.file] or [finding.keys[0]]
        report.add(path_of(written[0]), finding.message, finding.hint)
    return Draft(config, in_order(report.problems), frozenset(report.broken), source)


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """From the top of the file to its end, then those without a line, then the command line."""

    def position(problem: Problem) -> tuple[bool, float]:
        line = problem.where.rpartition(", line ")[2]
        return problem.where == COMMAND_LINE, int(line) if line.isdecimal() else math.inf

    return tuple(sorted(problems, key=position))


@dataclass
class _Report:
    source: Source
    problems: list[Problem] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    def add(self, path: KeyPath, message: str, hint: str) -> None:
        self.problems.append(Problem(message, hint, self.source.place(path)))

    def is_broken(self, path: KeyPath) -> bool:
        return any(key_of(path[:length]) in self.broken for length in range(1, len(path) + 1))


def _absolute(section: Any, folder: Path) -> Any:
    """The same section with every path absolute, counted from `folder`; `..` is worked out, links stay."""
    changed: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Path):
            changed[name] = from_folder(folder, value)
        elif LOCATION in type(section).model_fields[name].metadata and "://" not in value:
            changed[name] = str(from_folder(folder, Path(value)))
        elif isinstance(value, Section):
            changed[name] = _absolute(value, folder)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            changed[name] = tuple(_absolute(item, folder) for item in value)
    return section.model_copy(update=changed)


# keys


def _recognise(source: Source, node: dict[str, Any], path: KeyPath, report: _Report) -> None:
    """Reports keys that no setting has. Where it is clear what was meant, the value is checked as that; else it is left out."""
    for name in list(node):
        here = (*path, name)
        if "." in name or generic(key_of(here)) not in all_keys():
            right = _report_unknown(source, node, here, report)
            if right is None:
                del node[name]
                continue
            node[right] = node.pop(name)
            name = right
        _recognise_inside(source, node[name], (*path, name), report)


def _recognise_inside(source: Source, value: Any, path: KeyPath, report: _Report) -> None:
    section = generic(key_of(path))
    if section not in table().sections:
        return
    if section in _LISTS:
        for index, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, dict):
                _recognise(source, item, (*path, index), report)
    elif isinstance(value, dict):
        _recognise(source, value, path, report)


def _report_unknown(source: Source, node: dict[str, Any], path: KeyPath, report: _Report) -> str | None:
    """Returns the name in the same section that was surely meant, or None."""
    suggestions = suggest(key_of(path), all_keys())
    kind = "section" if isinstance(node[str(path[-1])], dict) else "setting"
    report.add(path, f"unknown {kind} `{key_of(path)}`", words.suggestion_hint(suggestions, section=key_of(path[:-1])))
    parent, _, right = suggestions[0].rpartition(".") if suggestions else ("", "", "")
    if not right or parent != generic(key_of(path[:-1])) or right in node:
        return None
    source.rename(path, (*path[:-1], right))
    if not isinstance(node[str(path[-1])], dict):
        report.broken.add(key_of((*path[:-1], right)))
    return right


def _settle_optimizer(source: Source, report: _Report) -> None:
    """Makes sure that `optimizer.name` is one, and that the other settings in its section are its own."""
    section = source.data.get(OPTIMIZER)
    if not isinstance(section, dict):
        return
    name = section.get("name", "adamw")
    if name not in optimizer_names():
        report.add((OPTIMIZER, "name"), *words.wrong_value("optimizer.name", name))
        report.broken.add("optimizer.name")
        name = section["name"] = words.nearest(str(name), optimizer_names()) or "adamw"
    for other in [other for other in section if f"{OPTIMIZER}.{other}" not in table(name).settings]:
        owners = " and ".join(f'"{owner}"' for owner in optimizers_with(f"{OPTIMIZER}.{other}"))
        if "optimizer.name" not in report.broken:
            message = f'`{OPTIMIZER}.{other}` is no setting of the optimizer "{name}"'
            report.add((OPTIMIZER, other), message, f"it belongs to {owners}: leave it out, or choose that optimizer")
        del section[other]


# values


def _validate(source: Source, report: _Report) -> Config:
    """The config. Wrong values are reported and replaced by their defaults until the rest can be read."""
    for _ in range(_MAX_REPAIRS):
        try:
            return Config.model_validate_json(json.dumps(source.data, default=str), strict=True)
        except ValidationError as error:
            paths = {_locate(source.data, detail["loc"], missing=detail["type"] == "missing") for detail in error.errors()}
        for path in sorted(paths, key=str):
            if not any(other[: len(path)] == path and other != path for other in paths):
                _report_value(source, path, report)
                _repair(source.data, path)
    raise AssertionError(f"{source.file} cannot be repaired: {paths}")


def _locate(data: Any, location: KeyPath, *, missing: bool) -> KeyPath:
    """Where in the data an error is. Pydantic's own location also names branches of unions, which are no keys."""
    path: list[str | int] = []
    for part in location:
        if _holds(data, part):
            data = data[part]
            path.append(part)
        elif missing and part == location[-1] and isinstance(data, dict):
            path.append(part)
    return tuple(path)


def _holds(data: Any, part: str | int) -> bool:
    if isinstance(data, list):
        return isinstance(part, int) and part < len(data)
    return isinstance(data, dict) and part in data


def _report_value(source: Source, path: KeyPath, report: _Report) -> None:
    if not report.is_broken(path):
        parent: Any = _get(source.data, path[:-1])
        known = _holds(parent, path[-1])
        key, section = key_of(path), source.data.get(OPTIMIZER)
        optimizer = section.get("name") if isinstance(section, dict) else None
        report.add(path, *(words.wrong_value(key, parent[path[-1]], optimizer) if known else words.missing_value(key)))
    report.broken.add(key_of(path))


def _get(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _repair(data: Any, path: KeyPath) -> None:
    """Takes a wrong value out, or puts a stand-in where one is needed."""
    while isinstance(path[-1], int) and generic(key_of(path)) not in _STAND_INS:
        path = path[:-1]  # one bad entry takes its list along
    parent: Any = _get(data, path[:-1])
    name = path[-1]
    stand_in = _STAND_INS.get(generic(key_of(path)))
    if stand_in is not None:
        parent[name] = json.loads(json.dumps(stand_in))
    else:
        del parent[name]
