"""The commented config that `init` writes: values from a preset, explanations from the schema."""

from __future__ import annotations

import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from aquatint.config.describe import ANY_INDEX, OPTIMIZER, Setting, table
from aquatint.config.positions import toml_lines

LINE_LENGTH = 118
_HEADER = """\
Lines that start with # are explanations, or settings at their defaults: remove the # to change one.
`aquatint check` finds every mistake, `aquatint plan` shows steps and memory, `aquatint train` begins."""
_EVIDENT = ("a path", "text", "true or false")  # kinds that the value itself shows


@dataclass(frozen=True)
class Preset:
    """A complete run for one size of GPU. `reasons` are the comments behind its settings, by dotted key."""

    name: str
    vram_gb: int
    header: str
    values: Mapping[str, Any]
    reasons: Mapping[str, str]


def preset_names() -> tuple[str, ...]:
    """From the smallest GPU to the largest."""
    names = [entry.name.removesuffix(".toml") for entry in (files("aquatint.config") / "presets").iterdir() if entry.name.endswith(".toml")]
    return tuple(sorted(names, key=_vram_of))


def _vram_of(name: str) -> int:
    found = re.search(r"(\d+)gb$", name)
    return int(found[1]) if found else 0


def preset_text(name: str) -> str:
    """The preset as it is in the package. Raises KeyError for a name that there is not."""
    if name not in preset_names():
        raise KeyError(name)
    return (files("aquatint.config") / "presets" / f"{name}.toml").read_text(encoding="utf-8")


def load_preset(name: str) -> Preset:
    text = preset_text(name)
    rows = text.splitlines()
    header = [row.removeprefix("#").strip() for row in rows[: next(index for index, row in enumerate(rows) if not row.startswith("#"))]]
    reasons = {}
    for path, line in toml_lines(text).items():
        _, mark, comment = rows[line - 1].partition("  # ")
        if mark:
            reasons[".".join(map(str, path))] = comment
    return Preset(name, _vram_of(name), "\n".join(header), dict(flatten(tomllib.loads(text))), reasons)


def preset_for(vram_gb: float) -> Preset | None:
    """The preset for the largest GPU that is no larger than this one."""
    fitting = [name for name in preset_names() if _vram_of(name) <= vram_gb]
    return load_preset(fitting[-1]) if fitting else None


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from flatten(value, f"{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, item in enumerate(value):
                yield from flatten(item, f"{key}.{index}.")
        else:
            yield key, value


def render(preset: Preset, changes: Mapping[str, Any], *, every_setting: bool = True) -> str:
    """A config in TOML with the preset's values and `changes` (by dotted key) on top, each with its explanation.

    With `every_setting`, the others follow as comments with their defaults.
    """
    values = {**preset.values, **changes}
    rows = [*_comment(preset.header), "#", *_comment(_HEADER)] if every_setting else _comment(preset.header)
    settings = table(str(values.get(f"{OPTIMIZER}.name", "adamw"))).settings.values()
    for section, doc in table().sections.items():
        inside = [setting for setting in settings if setting.key.rpartition(".")[0] in (section, f"{section}.{ANY_INDEX}")]
        for prefix in _tables(section, inside, values):
            shown = [row for setting in inside for row in _setting_rows(setting, prefix, values, preset.reasons, every_setting)]
            if shown:
                brackets = ("[[", "]]") if ANY_INDEX in inside[0].key else ("[", "]")
                rows += ["", *_comment(doc), f"{brackets[0]}{section}{brackets[1]}", *shown[:-1]]
    return "\n".join(rows) + "\n"


def _tables(section: str, inside: Sequence[Setting], values: Mapping[str, Any]) -> list[str]:
    """The key prefixes of a section: one per table where it is a list of tables."""
    if not inside or ANY_INDEX not in inside[0].key:
        return [f"{section}."]
    return list(dict.fromkeys(f"{section}.{key[len(section) + 1 :].split('.')[0]}." for key in values if key.startswith(f"{section}.")))


def _setting_rows(
    setting: Setting, prefix: str, values: Mapping[str, Any], reasons: Mapping[str, str], every_setting: bool
) -> list[str]:  # fmt: skip
    name = setting.key.rpartition(".")[2]
    key = f"{prefix}{name}"
    if key not in values and not every_setting:
        return []
    about = _comment(setting.doc if setting.kind in _EVIDENT else f"{setting.doc} {_capitalised(setting.kind)}.")
    if key in values:
        reason = f"  # {reasons[key]}" if key in reasons else ""
        return [*about, f"{name} = {to_toml(values[key])}{reason}", ""]
    return [*about, f"# {name} = {to_toml(setting.default)}" if setting.default is not None else f"# {name} = …   (not set)", ""]


def _comment(text: str) -> list[str]:
    return [f"# {row}" for line in text.split("\n") for row in (textwrap.wrap(line, LINE_LENGTH) if line else [])]


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def to_toml(value: Any) -> str:
    """A value as TOML: text, numbers, booleans and lists of them."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
        mantissa, e, exponent = text.partition("e")
        return f"{mantissa}e{int(exponent)}" if e else text
    if isinstance(value, list | tuple):
        items = [to_toml(item) for item in value]
        flat = f"[{', '.join(items)}]"
        return flat if len(flat) <= LINE_LENGTH else "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    if isinstance(value, int):
        return str(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007F")
