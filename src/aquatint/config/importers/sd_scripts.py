"""Datasets of sd-scripts: dataset configs (TOML or JSON), and folders of folders named `10_word`. Nothing of them is changed.

What the options mean there: docs/config_README-en.md and library/config_util.py of kohya-ss/sd-scripts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aquatint.config.importers.draft import Imported, Line, printable, shown
from aquatint.config.importers.sd_scripts_notes import Draft, Subset, Written
from aquatint.config.importers.sd_scripts_options import FROM_COMMAND_LINE, KIND_WORDS, OPTIONS, fits
from aquatint.config.importers.sd_scripts_settings import set_run
from aquatint.config.importers.sd_scripts_sources import find_places, source_tables
from aquatint.config.importers.survey import survey
from aquatint.config.parse import Source, read_source
from aquatint.config.positions import KeyPath
from aquatint.errors import StorageError, UsageError

_GUI_FOLDERS = ("img", "reg")  # of kohya_ss: pictures and regularization pictures, side by side
_TRAINER_OPTIONS = ("dataset_config", "train_data_dir", "in_json")  # in a config of the trainer itself: where the pictures are
_METADATA = {"caption", "tags", "train_resolution", "image_size"}  # what a metadata file has of a picture
_BASE = "sd_xl_base_1.0.safetensors"
_REFUSED = "sd-scripts refuses a config with it"


@dataclass(frozen=True)
class _Reading:
    """What was read: the subsets with all that holds for them, and each option, or what is to be said of it, in its order."""

    subsets: list[Subset]
    items: list[Written | Line]


def import_dataset(path: Path | str, *, regularization: Path | str | None = None) -> Imported:
    """A draft of a config from a dataset config, or from a folder of folders with repeats in their names.

    `regularization` is a second such folder. Raises UsageError for what cannot be read or is neither of the two.
    """
    path = Path(path)
    if path.is_dir():
        return _import_folders(path, None if regularization is None else Path(regularization))
    if not path.exists():
        raise UsageError(f"there is no file or folder {path}", hint="give the dataset config (.toml, .json) or the picture folder")
    if regularization is not None:
        raise UsageError("a dataset config names its own regularization pictures", hint="leave that folder out, or import a folder")
    return _build(f"{printable(path.name)}, a dataset config of sd-scripts", path.absolute().parent, _read_file(path))


def _build(source: str, folder: Path, reading: _Reading) -> Imported:
    """The draft, with a line for each item. Relative paths count from here or from `folder`. Raises UsageError."""
    draft = Draft()
    draft.set("model.base", _BASE, "the model to start from: not in a dataset config, so set it")
    places = find_places(draft, folder, reading.subsets)
    sources = source_tables(draft, places)
    if places:
        set_run(draft, places)
    lines = [item if isinstance(item, Line) else draft.line(item) for item in reading.items]
    if not places:
        reasons = dict.fromkeys(f"{line.where}: {line.text}" for line in lines if line.verdict == "not supported")
        raise UsageError(f"there are no pictures for {source}", hint="; ".join(reasons) or "add folders with pictures")
    model, data = draft.values.pop("model"), {"sources": sources, **draft.values.pop("data", {})}
    return Imported(source, {"model": model, "data": data, **draft.values}, draft.origins, (*lines, *draft.unset))


# Dataset configs


def _read_file(path: Path) -> _Reading:
    if path.suffix.lower() not in (".toml", ".json"):
        raise UsageError(f"{path} is not a dataset config of sd-scripts", hint="give a .toml or .json file, or the picture folder")
    try:
        source = read_source(path)
    except StorageError as error:
        raise UsageError(error.message, hint=error.hint) from error
    _check_is_dataset_config(path, source.data)
    items: list[Written | Line] = [
        _unknown_part(source, name, value) for name, value in source.data.items() if name not in ("general", "datasets")
    ]
    general = _options(source, ("general",), items)
    subsets: list[Subset] = []
    for index in range(len(_list(source, ("datasets",)))):
        here = ("datasets", index)
        common = {**general, **_options(source, here, items)}
        for number in range(len(_list(source, (*here, "subsets")))):
            own = _options(source, (*here, "subsets", number), items)
            subsets.append(Subset({**common, **own}, index))
    if not subsets:
        raise UsageError(
            f"{path} names no pictures", hint="a dataset config has [[datasets]], and in it [[datasets.subsets]] with image_dir"
        )
    return _Reading(subsets, items)


def _check_is_dataset_config(path: Path, data: Mapping[str, Any]) -> None:
    if isinstance(data.get("datasets"), list):
        return
    flat = {**data, **{name: value for part in data.values() if isinstance(part, dict) for name, value in part.items()}}
    if named := [f"{name} = {shown(flat[name])}" for name in _TRAINER_OPTIONS if flat.get(name)]:
        raise UsageError(f"{path} is a config of the trainer, not of its dataset", hint=f"import what it names: {', '.join(named)}")
    if data and all(
        isinstance(value, dict) and {"caption", "tags", "train_resolution", "image_size"} & set(value) for value in data.values()
    ):
        raise UsageError(
            f"{path} has captions of pictures, and no settings",
            hint='it needs no import: name it in a config as `path` of a [[data.sources]] with kind = "table"',
        )
    near = difflib.get_close_matches("datasets", list(data), n=1)
    guess = f"is `{near[0]}` meant to be [[datasets]]?" if near else "it has no [[datasets]]"
    raise UsageError(f"{path} is not a dataset config of sd-scripts", hint=f"{guess}; `aquatint init` writes a config for other pictures")


def _unknown_part(source: Source, name: str, value: Any) -> Line:
    place = "[general], [[datasets]] or [[datasets.subsets]]" if name in OPTIONS else "a file with [general] and [[datasets]]"
    return Line(_where(source, (name,)), printable(name), shown(value), "not supported", f"it stands outside of {place}: {_REFUSED}")


def _list(source: Source, path: KeyPath) -> list[Any]:
    """The tables of a list of tables. Raises UsageError if they are none."""
    value = _at(source.data, path)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        name = ".".join(str(part) for part in path if isinstance(part, str))
        raise UsageError(f"`{name}` in {source.place(path)} is not a list of tables", hint=f"write it with two brackets: [[{name}]]")
    return value


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, dict) else data[part]
    return data


def _options(source: Source, path: KeyPath, items: list[Written | Line]) -> dict[str, Written]:
    """The options of one table that sd-scripts knows, by name. All go to `items`, the others as lines."""
    table = _at(source.data, path)
    found: dict[str, Written] = {}
    if not isinstance(table, dict | None):
        items.append(
            Line(_where(source, path), printable(str(path[-1])), shown(table), "not supported", f"it should be a table: {_REFUSED}")
        )
    for name, value in table.items() if isinstance(table, dict) else ():
        if name == "subsets" and len(path) == 2:
            continue
        where = _where(source, (*path, name))
        if reason := _refusal(name, value, is_subset=len(path) == 4):
            items.append(Line(where, printable(name), shown(value), "not supported", reason))
        else:
            found[name] = Written(name, value, where)
            items.append(found[name])
    return found


def _refusal(name: str, value: Any, *, is_subset: bool) -> str:
    """Why sd-scripts does not take an option, or nothing."""
    option = OPTIONS.get(name)
    if option is None:
        near = FROM_COMMAND_LINE.get(name) or next(iter(difflib.get_close_matches(name, OPTIONS, n=1)), "")
        return f"there is no such option{f', but `{near}`' if near else ''}: {_REFUSED}"
    if option.place == ("datasets" if is_subset else "subsets"):
        home = "[general] or [[datasets]]" if is_subset else "[[datasets.subsets]]"
        return f"it belongs in {home}: {_REFUSED}"
    return "" if fits(option.kind, value) else f"it should be {KIND_WORDS[option.kind]}: {_REFUSED}"


def _where(source: Source, path: KeyPath) -> str:
    """`line N`, or the table if there is no line."""
    line = source.lines.get(path)
    return f"line {line}" if line else ".".join(map(str, path[:-1])) or "top"


# Folders


def _import_folders(folder: Path, regularization: Path | None) -> Imported:
    if not _is_text(str(folder.absolute())):
        raise UsageError(f"the name of {printable(str(folder))} is no text", hint="rename it with plain letters: no config can hold it")
    pictures, beside = folder / _GUI_FOLDERS[0], folder / _GUI_FOLDERS[1]
    if not _has_repeats(folder) and pictures.is_dir() and _has_repeats(pictures):
        folder = pictures
        regularization = beside if regularization is None and beside.is_dir() else regularization
    items: list[Written | Line] = []
    subsets = list(_read_folder(folder, items, is_reg=False))
    if not subsets:
        raise UsageError(
            f"there are no folders of pictures with repeats in their names, such as 10_word, in {folder}",
            hint="give the folder that they are in; pictures in a plain folder need no import: `aquatint init --pictures FOLDER`",
        )
    if regularization is not None:
        if not regularization.is_dir():
            raise UsageError(f"there is no folder {regularization}", hint="give the folder of the regularization pictures' folders")
        subsets += _read_folder(regularization, items, is_reg=True)
    name = printable(folder.name or str(folder))
    imported = _build(f"the folder {name}, as sd-scripts reads it", folder.absolute(), _Reading(subsets, items))
    return replace(imported, report=tuple(line for line in imported.report if line.option != "image_dir" or line.verdict != "mapped"))


def _has_repeats(folder: Path) -> bool:
    return any(_repeats(name) for name in _folders_in(folder))


def _repeats(name: str) -> tuple[int, str] | None:
    """Repeats and class words of a folder's name, if it has any: `10_sks girl`."""
    number, _, words = name.partition("_")
    return (int(number), words) if re.fullmatch(r"\d{1,9}", number, re.ASCII) and int(number) > 0 else None


def _folders_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UsageError(
            f"the folder {folder} cannot be read: {error.strerror or error}", hint="check its permissions and its disk"
        ) from error


def _read_folder(folder: Path, items: list[Written | Line], *, is_reg: bool) -> Iterator[Subset]:
    for name in _folders_in(folder):
        where, parts = printable(name), _repeats(name)
        if parts is None or not _is_text(name):
            reason = "no repeats in its name: sd-scripts leaves it out too" if parts is None else "its name is no text: rename it"
            items.append(Line(where, "(folder)", "", "not supported", reason))
            continue
        values = {"image_dir": str(folder.absolute() / name), "num_repeats": parts[0], "class_tokens": parts[1], "is_reg": is_reg}
        options = {option: Written(option, value, where) for option, value in values.items() if value not in ("", False)}
        items.extend(options.values())
        yield Subset(options, 0, is_named_by_folder=True)
    loose = survey(folder, ())
    if loose is not None and loose.num_pictures:
        text = f"{loose.num_pictures:,} pictures lie beside the folders: sd-scripts leaves them out too"
        items.append(Line(printable(folder.name), "(folder)", "", "not supported", text))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes in no encoding, which no config can hold
        return False
    return True
