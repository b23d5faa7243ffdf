"""Manifests for a config, row by row, without files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from aquatint.config.schema import Config
from aquatint.data.index import bytes_column
from aquatint.data.manifest import COLUMNS, Manifest
from aquatint.planning.sources import sources_of
from aquatint.training.layout import Layout, lay_out, plan_digest, recipes_of

DIGESTS = {"vae": "a", "text_encoders": "b"}
SIZES_HW = [(64, 64), (48, 80), (80, 48), (64, 64)]


@dataclass(frozen=True)
class Row:
    """A picture. `content` decides its digest, and `mask` that of its mask."""

    content: int
    size_hw: tuple[int, int] = (64, 64)
    captions: tuple[str, ...] = ("a red circle",)
    source: int = 0
    mask: int | None = None
    name: str = ""
    is_reducible: bool = False


def digest(content: int) -> bytes:
    return np.random.default_rng(content).bytes(16)


def some(count: int, first: int = 0, **changes) -> list[Row]:
    """Pictures of several shapes."""
    return [Row(first + index, SIZES_HW[index % 4], **changes) for index in range(count)]


def manifest_of(config: Config, rows: Sequence[Row]) -> Manifest:
    """The manifest of these pictures, in this order."""
    names = [row.name or f"{row.content}.png" for row in rows]
    masks = [None if row.mask is None else b"/masks/%d.png" % row.mask for row in rows]
    columns = {
        "name": pa.array(names, pa.string()),
        "path": pa.array([f"/{name}".encode() for name in names], pa.binary()),
        "start": pa.array([0] * len(rows), pa.int64()),
        "length": pa.array([-1] * len(rows), pa.int64()),
        "column": pa.array([b""] * len(rows), pa.binary()),
        "digest": bytes_column(np.frombuffer(b"".join(digest(row.content) for row in rows), np.uint8).reshape(-1, 16)),
        "height": pa.array([row.size_hw[0] for row in rows], pa.int32()),
        "width": pa.array([row.size_hw[1] for row in rows], pa.int32()),
        "is_reducible": pa.array([row.is_reducible for row in rows], pa.bool_()),
        "captions": pa.array([list(row.captions) for row in rows], pa.list_(pa.string())),
        "source": pa.array([row.source for row in rows], pa.int16()),
        "mask_path": pa.array(masks, pa.binary()),
        "mask_start": pa.array([None if mask is None else 0 for mask in masks], pa.int64()),
        "mask_length": pa.array([None if mask is None else -1 for mask in masks], pa.int64()),
        "mask_column": pa.array([None if mask is None else b"" for mask in masks], pa.binary()),
        "mask_digest": pa.array([None if row.mask is None else digest(1000 + row.mask) for row in rows], pa.binary(16)),
    }
    return Manifest(pa.table([columns[name] for name in COLUMNS], names=list(COLUMNS)), sources_of(config))


def layout_of(config: Config, rows: Sequence[Row], *, digests: dict[str, str] = DIGESTS, focus=None) -> Layout:
    return lay_out(config, manifest_of(config, rows), recipes_of(config, digests), focus)


def digest_of(config: Config, rows: Sequence[Row], *, digests: dict[str, str] = DIGESTS) -> str:
    return plan_digest(config, layout_of(config, rows, digests=digests))
