"""A config that was made from another trainer's, and what became of each of its options."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from aquatint.config.template import LINE_LENGTH
from aquatint.config.template import to_toml as value_to_toml

Verdict = Literal["mapped", "approximated", "not supported"]
TITLES: dict[Verdict, str] = {
    "mapped": "Taken over",
    "approximated": "Taken over with a difference",
    "not supported": "Not taken over",
}
_MAX_SHOWN = 40  # characters of a value
_MAX_FIRST = 48  # characters before the text of a line begins a row of its own


@dataclass(frozen=True)
class Line:
    """What became of an option. `where` is its line or folder; `value` is as it was written, empty for one that was not."""

    where: str
    option: str
    value: str
    verdict: Verdict
    text: str

    @property
    def subject(self) -> str:
        return f"{self.option} = {self.value}" if self.value else self.option


@dataclass(frozen=True)
class Imported:
    """A draft of a config: sections, settings, plain values. `origins` says by dotted key which option a setting comes from.

    `source` is what was read, in words.
    """

    source: str
    config: Mapping[str, Any]
    origins: Mapping[str, str]
    report: tuple[Line, ...]

    def count(self, verdict: Verdict) -> int:
        return sum(line.verdict == verdict for line in self.report)


def shown(value: Any) -> str:
    """A value in one short line."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def printable(text: str) -> str:
    """Text without line ends and control codes, which a comment cannot hold either."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def report_text(imported: Imported) -> str:
    """The report as a table for a terminal: what was taken over, with a difference, and not at all."""
    return "\n".join(_report_rows(imported, tuple(TITLES))) + "\n"


def to_toml(imported: Imported) -> str:
    """The draft as a config file, with a comment behind each setting and the differences at the top."""
    about = [f"From {imported.source}, by `aquatint import`.", "Nothing in it speaks of the model, the optimizer or the length:"]
    about += ["`aquatint init` writes a config with all of that, to copy from.", *_report_rows(imported, ("approximated", "not supported"))]
    rows = [f"# {row}".rstrip() for row in about]
    for name, section in imported.config.items():
        rows += _section_rows(name, section, imported.origins)
    return "\n".join(rows) + "\n"


def _section_rows(name: str, section: Mapping[str, Any], origins: Mapping[str, str]) -> list[str]:
    """A section with its settings, then the lists of sections in it."""
    plain = {key: value for key, value in section.items() if not _is_list_of_sections(value)}
    rows = ["", f"[{name}]"] if plain else []
    rows += [_setting_row(f"{name}.{key}", value, origins) for key, value in plain.items()]
    for key, value in section.items():
        for index, item in enumerate(value if _is_list_of_sections(value) else ()):
            rows += ["", f"[[{name}.{key}]]"]
            rows += [_setting_row(f"{name}.{key}.{index}.{inner}", setting, origins) for inner, setting in item.items()]
    return rows


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _setting_row(key: str, value: Any, origins: Mapping[str, str]) -> str:
    origin = f"  # {printable(origins[key])}" if key in origins else ""
    return f"{key.rpartition('.')[2]} = {value_to_toml(value)}{origin}"


def _report_rows(imported: Imported, verdicts: tuple[Verdict, ...]) -> Iterator[str]:
    for verdict in verdicts:
        lines = [line for line in imported.report if line.verdict == verdict]
        if lines:
            yield from ("", f"{TITLES[verdict]}:")
            width = max(len(line.where) for line in lines)
            subject_width = min(max(len(line.subject) for line in lines), _MAX_FIRST)
            for line in lines:
                yield from _line_rows(line, width, subject_width)


def _line_rows(line: Line, width: int, subject_width: int) -> Iterator[str]:
    """Place and option, and beside them the text, in as many rows as it takes."""
    first = f"  {line.where:<{width}}  {line.subject:<{subject_width}}  "
    margin = 2 + width + 2 + subject_width + 2
    if len(first) > margin:
        yield first.rstrip()
        first = " " * margin
    rows = textwrap.wrap(line.text, max(40, LINE_LENGTH - margin), break_on_hyphens=False) or [""]
    yield f"{first}{rows[0]}".rstrip()
    yield from (f"{'':<{margin}}{row}" for row in rows[1:])
