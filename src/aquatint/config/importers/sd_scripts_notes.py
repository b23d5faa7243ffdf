"""What was written for sd-scripts, and what is said about each option while a draft is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aquatint.config.importers.draft import Line, Verdict, shown
from aquatint.config.importers.sd_scripts_options import OPTIONS
from aquatint.config.importers.survey import Survey

WITHOUT_EFFECT = "without effect"
_SEVERITY: tuple[Verdict, ...] = ("mapped", "approximated", "not supported")


@dataclass(frozen=True, eq=False)
class Written:
    """An option as it was written. `where` is its line, or the folder whose name says it."""

    name: str
    value: Any
    where: str


@dataclass(frozen=True)
class Subset:
    """A folder or metadata file with all options that hold for it, by name, also those of its dataset."""

    options: Mapping[str, Written]
    dataset: int
    is_named_by_folder: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        return self.options[name].value if name in self.options else default


@dataclass(frozen=True)
class Place:
    """A subset that is used, its path here, and what lies there. `endings` are those of its caption files."""

    subset: Subset
    path: str
    endings: tuple[str, ...]
    survey: Survey | None

    @property
    def is_reg(self) -> bool:
        return bool(self.subset.get("is_reg", False))

    @property
    def num_samples(self) -> int | None:
        return self.survey.num_pictures * int(self.subset.get("num_repeats", 1)) if self.survey else None


@dataclass
class Draft:
    """Settings by section, the options that they come from by dotted key, and notes on each option."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: dict[Written, list[tuple[Verdict, str]]] = field(default_factory=dict)
    unset: list[Line] = field(default_factory=list)

    def set(self, key: str, value: Any, origin: str) -> None:
        section, _, name = key.rpartition(".")
        self.values.setdefault(section, {})[name] = value
        self.origins[key] = origin

    def note(self, written: Written | None, verdict: Verdict, text: str) -> None:
        if written is not None:
            self.notes.setdefault(written, []).append((verdict, text))

    def note_unset(self, option: str, text: str) -> None:
        """Says what it means that an option is not there."""
        line = Line("not set", option, "", "approximated", text)
        if line not in self.unset:
            self.unset.append(line)

    def line(self, written: Written) -> Line:
        """What became of an option: the worst that was noted."""
        option = OPTIONS[written.name]
        notes = self.notes.get(written) or [("mapped", f"{WITHOUT_EFFECT}: no subset that is used takes it from here")]
        if option.missing:
            is_off = written.value == option.off
            notes = [("mapped", "off, as it always is here")] if is_off else [(option.verdict, option.missing)]
        worst: Verdict = max((verdict for verdict, _ in notes), key=_SEVERITY.index)
        texts = list(dict.fromkeys(text for verdict, text in notes if verdict == worst))
        effects = [text for text in texts if not text.startswith(WITHOUT_EFFECT)]
        return Line(written.where, written.name, shown(written.value), worst, "; ".join(effects or texts))

    def settle(
        self, places: Sequence[Place], name: str, key: str, default: Any, convert: Callable[[Any], Any] = lambda value: value
    ) -> Any:
        """The value that most subsets have, regularization aside. With a `key`, it is set, if the option was written anywhere."""
        values = [place.subset.get(name, default) for place in places if not place.is_reg]
        values = values or [place.subset.get(name, default) for place in places]
        winner = max(values, key=values.count)
        written = written_in(places, name)
        for one in written:
            if one.value != winner:
                self.note(one, "approximated", f"one for all sources here: {shown(winner)}, as most have")
            elif key:
                self.note(one, "mapped", f"{key} = {shown(convert(winner))}")
        if key and written and winner != "":
            self.set(key, convert(winner), name)
        return winner


def written_in(places: Sequence[Place], *names: str) -> list[Written]:
    """The options of these names that hold for any of the places, each once."""
    return list(dict.fromkeys(place.subset.options[name] for place in places for name in names if name in place.subset.options))
