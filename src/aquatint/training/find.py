"""The config's sources as the data room knows them, and the pictures that are found in them.

This module, `layout`, `prepare` and `build` are the composition root: the only ones that hand the config's values to the
rooms below.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aquatint.config.schema import Config
from aquatint.data.captions import CaptionPolicy, Category
from aquatint.data.ledger import check_limits
from aquatint.data.manifest import Manifest, scan
from aquatint.data.places import Opener
from aquatint.planning.sources import sources_of
from aquatint.storage import write_json


def opener_of(config: Config) -> Opener:
    """How the bytes of pictures are reached; what comes from elsewhere is kept with the cache."""
    return Opener(config.cache.folder / "downloads")


def find_pictures(config: Config, opener: Opener, quarantine: Mapping[bytes, str], *, rehash: bool = False) -> Manifest:
    """Scans the sources. Raises DataError when too many pictures are bad or have no caption."""
    manifest = scan(
        sources_of(config), opener=opener, max_pixels=config.data.max_pixels, index_folder=config.cache.folder / "index",
        quarantine=quarantine, rehash=rehash,
    )  # fmt: skip
    manifest = manifest.without(_bad_masks(manifest, quarantine))
    check_limits(manifest, max_bad_share=config.data.max_bad_share, max_uncaptioned_share=config.data.max_uncaptioned_share)
    return manifest


def _bad_masks(manifest: Manifest, quarantine: Mapping[bytes, str]) -> dict[int, str]:
    """Why pictures cannot be used that are whole themselves, but whose mask could not be decoded: row -> reason."""
    if not quarantine:
        return {}
    masked = np.flatnonzero(manifest.mask_digests.any(axis=1))
    found = ((int(row), quarantine.get(manifest.mask_digests[row].tobytes())) for row in masked)
    return {row: f"its mask {reason}" for row, reason in found if reason is not None}


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
