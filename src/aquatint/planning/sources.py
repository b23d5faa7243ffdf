"""The config's sources as the data room knows them, and what they list, before any picture is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from aquatint.config.check import TABLE_ENDINGS
from aquatint.config.schema import Config
from aquatint.config.sections.data import SourceSection
from aquatint.data.places import Opener
from aquatint.data.sources.folder import list_folder
from aquatint.data.sources.listing import Entry, Remarks, Source
from aquatint.data.sources.tables import list_table
from aquatint.data.sources.tar import list_tars

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SAMPLE_STEPS = 1000  # what a share amounts to in an epoch is kept to a thousandth of a sample: larger terms would serve nobody
LISTS = {"folder": list_folder, "table": list_table, "tar": list_tars}


def sources_of(config: Config) -> tuple[Source, ...]:
    """The sources, each with its kind settled."""
    return tuple(_source(section) for section in config.data.sources)


def _source(section: SourceSection) -> Source:
    return Source(
        path=section.path, kind=kind_of(section), caption_extensions=section.caption_extensions, caption_lines=section.caption_lines,
        picture_column=section.picture_column or "", caption_columns=section.caption_columns, mask_column=section.mask_column or "",
        masks=section.masks, role=section.role, repeats=exactly(section.repeats), loss_weight=section.loss_weight, trigger=section.trigger,
    )  # fmt: skip


def kind_of(section: SourceSection) -> Literal["folder", "table", "tar"]:
    """What a source's path is: as the config says, or else by its ending, or by a table of metadata in the folder."""
    if section.kind != "auto":
        return section.kind
    ending = Path(section.path).suffix.lower()
    if ending == ".tar":
        return "tar"
    if ending in TABLE_ENDINGS or any((Path(section.path) / name).is_file() for name in METADATA_FILES):
        return "table"
    return "folder"


def exactly(number: float) -> Fraction:
    """The fraction that somebody who wrote this number meant: 0.1 is a tenth."""
    return Fraction(str(number))


def repeats_of(config: Config, counts: Sequence[int]) -> tuple[Fraction, ...]:
    """How often the pictures of each source are shown per epoch; a share is worked out from the `counts` of training pictures.

    If no other source has pictures, shares are shares among each other, and an epoch has as many samples as there are pictures.
    """
    sections = config.data.sources
    plain = [exactly(section.repeats) for section in sections]
    shares = {index: exactly(section.share) for index, section in enumerate(sections) if section.share is not None and counts[index]}
    others = sum((count * plain[index] for index, count in enumerate(counts) if index not in shares), Fraction(0))
    total = sum(shares.values(), Fraction(0))
    for index, share in shares.items():
        samples = share * (others / (1 - total) if others else sum(counts) / total)
        plain[index] = Fraction(max(round(samples * SAMPLE_STEPS), 1), SAMPLE_STEPS * counts[index])
    return tuple(plain)


def is_remote(source: Source) -> bool:
    """Whether looking at a source means fetching something."""
    return "://" in source.path


@dataclass
class Listing:
    """What a source lists. `bare` are the names without any caption."""

    num_pictures: int = 0
    bare: list[str] = field(default_factory=list)
    remarks: Remarks = field(default_factory=Remarks)


def list_source(source: Source) -> Listing:
    """Names only: no picture is opened. Raises DataError for a source that cannot be read."""
    found = Listing()
    for entry in _entries(source, found.remarks):
        found.num_pictures += 1
        if not any(entry.captions) and entry.caption is None:
            found.bare.append(entry.name)
    return found


def _entries(source: Source, remarks: Remarks) -> Iterator[Entry]:
    return LISTS[source.kind](source, Opener(), remarks)
