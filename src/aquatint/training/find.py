"""The config's sources as the data room knows them, and the pictures that are found in them.

This module, `layout`, `prepare` and `build` are the composition root: the only ones that hand the config's values to the
rooms below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from aquatint.config.schema import Config
from aquatint.data.captions import CaptionPolicy, Category
from aquatint.data.ledger import check_limits
from aquatint.data.manifest import Manifest, scan
from aquatint.data.places import Opener
from aquatint.planning.sources import exactly, sources_of
from aquatint.storage import write_json

SHARE_STEPS = 1000  # a share is kept to a thousandth of a repeat: exact fractions of larger terms would serve nobody


def opener_of(config: Config) -> Opener:
    """How the bytes of pictures are reached; what comes from elsewhere is kept with the cache."""
    return Opener(config.cache.folder / "downloads")


def find_pictures(config: Config, opener: Opener, quarantine: Mapping[bytes, str], *, rehash: bool = False) -> Manifest:
    """Scans the sources. Raises DataError when too many pictures are bad or have no caption."""
    manifest = scan(
        sources_of(config), opener=opener, max_pixels=config.data.max_pixels, index_folder=config.cache.folder / "index",
        quarantine=quarantine, rehash=rehash,
    )  # fmt: skip
    check_limits(manifest, max_bad_share=config.data.max_bad_share, max_uncaptioned_share=config.data.max_uncaptioned_share)
    return manifest


def repeats_of(config: Config, counts: Sequence[int]) -> tuple[Fraction, ...]:
    """How often the pictures of each source are shown per epoch; a share is worked out from the `counts` of training pictures."""
    sections = config.data.sources
    plain = [exactly(section.repeats) for section in sections]
    shares = {index: exactly(section.share) for index, section in enumerate(sections) if section.share is not None and counts[index]}
    others = sum((count * plain[index] for index, count in enumerate(counts) if index not in shares), Fraction(0))
    whole = others / (1 - sum(shares.values(), Fraction(0)))
    for index, share in shares.items():
        plain[index] = max(Fraction(round(share * whole / counts[index] * SHARE_STEPS), SHARE_STEPS), Fraction(1, SHARE_STEPS))
    return tuple(plain)


def policies_of(config: Config) -> tuple[CaptionPolicy, ...]:
    """How captions are rendered, for each source: they differ in their trigger words."""
    section = config.captions
    categories = tuple(Category(category.tags, category.drop_prob) for category in section.categories)
    return tuple(
        CaptionPolicy(
            style=section.style, separator=section.separator, shuffle=section.shuffle, keep_first=section.keep_first,
            keep_separator=section.keep_separator, tag_drop_prob=section.tag_drop_prob, tag_drop=section.tag_drop, categories=categories,
            wildcards=section.wildcards, pick=section.pick, trigger=source.trigger, variants=section.variants,
        )
        for source in config.data.sources
    )  # fmt: skip


def read_quarantine(folder: Path) -> dict[bytes, str]:
    """Contents that could not be decoded earlier: digest of the bytes -> reason. A changed file has another digest."""
    path = folder / "quarantine.json"
    return {bytes.fromhex(digest): reason for digest, reason in json.loads(path.read_text()).items()} if path.exists() else {}


def write_quarantine(folder: Path, quarantine: Mapping[bytes, str]) -> None:
    """Raises StorageError."""
    write_json(folder / "quarantine.json", {digest.hex(): reason for digest, reason in quarantine.items()})
