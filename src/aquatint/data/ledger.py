"""Every picture accounted for: what is used, and what is not, with its reason; and whether that is within the limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from aquatint.data.downloads import public_name
from aquatint.data.indexing import counted
from aquatint.data.manifest import Manifest, Rejected, some_names
from aquatint.data.sources.listing import Source
from aquatint.data.sources.names import Names
from aquatint.errors import DataError
from aquatint.storage import write_text

TEXT_NAME, LINES_NAME = "ledger.txt", "ledger.jsonl"
_CAPTION_ENDINGS = (".txt", ".caption", ".captions", ".tags", ".tag", ".text", ".cap", ".prompt", ".json")  # what other tools write
_MAX_SHOWN = 5
_ROLES = {"train": "training", "regularization": "regularization", "validation": "validation"}


# Limits


def check_limits(manifest: Manifest, *, max_bad_share: float, max_uncaptioned_share: float) -> None:
    """Raises DataError if more than these shares are bad or have no caption, or if nothing can be used.

    Counts what is trained; of each source for validation, at least one picture has to be usable. One bad picture is always
    allowed, unless `max_bad_share` is 0. An empty caption counts as none; the trigger words of a source count as one.
    """
    trained = [number for number, source in enumerate(manifest.sources) if source.role != "validation"]
    bad = [one for one in manifest.rejected if one.bad and one.source in trained]
    num_used = int(manifest.has_role("train", "regularization").sum())
    num_listed = num_used + sum(one.source in trained for one in manifest.rejected)
    _check_usable(manifest)
    if len(bad) > max(1 if max_bad_share > 0 else 0, _share_of(num_listed, max_bad_share)):
        raise DataError(
            f"{len(bad):,} of {num_listed:,} pictures cannot be used, more than the {max_bad_share:.1%} that data.max_bad_share"
            f" allows: {_some(bad)}",
            hint="repair them or move them away, or raise data.max_bad_share to train without them",
        )
    has_trigger = np.array([bool(source.trigger.strip()) for source in manifest.sources])[manifest.source_of]
    bare = np.flatnonzero(~manifest.has_caption & ~has_trigger & manifest.has_role("train", "regularization"))
    if len(bare) > _share_of(num_used, max_uncaptioned_share):
        raise DataError(
            f"{len(bare):,} of {num_used:,} pictures have no caption, more than the {max_uncaptioned_share:.1%} that"
            f" data.max_uncaptioned_share allows: {some_names(manifest, bare, _MAX_SHOWN)}",
            hint=f"{_other_endings(manifest.others)}, or set data.max_uncaptioned_share = 1 to train without captions",
        )


def _check_usable(manifest: Manifest) -> None:
    """Raises DataError if there is nothing to train on, or a source for validation has nothing to measure."""
    used = np.bincount(manifest.source_of, minlength=len(manifest.sources))
    trained = [number for number, source in enumerate(manifest.sources) if source.role == "train"]
    groups = [("", trained)] if trained else []
    groups += [(f" in {public_name(source.path)}", [i]) for i, source in enumerate(manifest.sources) if source.role == "validation"]
    for where, sources in groups:
        if not used[sources].sum():
            rejected = [one for one in manifest.rejected if one.source in sources]
            raise DataError(
                f"none of the {len(rejected):,} pictures{where} can be used: {_some(rejected)}", hint="see whether other programs open them"
            )


def _some(rejected: Sequence[Rejected]) -> str:
    return str(Names(len(rejected), [f"{one.name} ({one.reason})" for one in rejected[:_MAX_SHOWN]]))


def _share_of(count: int, share: float) -> int:
    return int(share * count + 1e-9)  # 0.29 * 100 is a little less than 29


def _other_endings(others: Mapping[str, int]) -> str:
    found = {ending: others[ending] for ending in _CAPTION_ENDINGS if ending in others}
    if not found:
        return "write them"
    return f"set caption_extensions in data.sources if the other files there ({counted(found)}) are the captions"


# The ledger


def write_ledger(manifest: Manifest, folder: Path) -> None:
    """Writes `ledger.txt` for people, and `ledger.jsonl`, with a line for each picture that is not used. Raises StorageError."""
    write_text(folder / TEXT_NAME, ledger_text(manifest))
    write_text(folder / LINES_NAME, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in _lines(manifest)))


def _lines(manifest: Manifest) -> Iterator[dict[str, object]]:
    for one in manifest.rejected:
        source = manifest.sources[one.source]
        yield {
            "name": one.name,
            "path": public_name(one.place.path) if one.place else None,
            "source": public_name(source.path),
            "role": source.role,
            "skipped": "quarantined" if one.bad else "left out",
            "reason": one.reason,
            "digest": one.digest.hex() if one.digest else None,
        }


def ledger_text(manifest: Manifest) -> str:
    """Every picture accounted for: how many are used, and each one that is not, with its reason."""
    bad = [one for one in manifest.rejected if one.bad]
    left_out = [one for one in manifest.rejected if not one.bad]
    num_captioned = int(manifest.has_caption.sum())
    lines = [
        f"{summary(manifest)}",
        f"{num_captioned} have a caption, {len(manifest) - num_captioned} have none",
    ]
    lines += _section("Sources", _source_lines(manifest))
    lines += _section("Quarantined (left where they are, unchanged)", [f"{one.name}: {one.reason}" for one in bad])
    lines += _section("Left out", [f"{one.name}: {one.reason}" for one in left_out])
    lines += _section("Warnings", manifest.warnings)
    lines += _section("Left alone", [counted(manifest.others)] if manifest.others else [])
    return "\n".join(lines) + "\n"


def summary(manifest: Manifest, source: int | None = None) -> str:
    """`101 pictures listed = 89 used + 12 quarantined`, of all sources or of one."""
    used = len(manifest) if source is None else int((manifest.source_of == source).sum())
    skipped = [one for one in manifest.rejected if source is None or one.source == source]
    bad = sum(one.bad for one in skipped)
    left_out = f" + {len(skipped) - bad} left out" if len(skipped) > bad else ""
    return f"{used + len(skipped)} pictures listed = {used} used + {bad} quarantined{left_out}"


def _source_lines(manifest: Manifest) -> list[str]:
    return [f"{public_name(one.path)}: {summary(manifest, number)}; {_purpose(one)}" for number, one in enumerate(manifest.sources)]


def _purpose(source: Source) -> str:
    if source.role == "validation":
        return "for validation"
    times = "once" if source.repeats == 1 else f"{float(source.repeats):g} times"
    return f"for {_ROLES[source.role]}, {times} per epoch"


def _section(title: str, entries: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
