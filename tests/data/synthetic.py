"""Manifests of any size that no file stands behind."""

from fractions import Fraction

import numpy as np
import pyarrow as pa

from aquatint.data.index import bytes_column
from aquatint.data.manifest import COLUMNS, Manifest, Rejected
from aquatint.data.sources.listing import Source

FOLDER = "/pictures"


def manifest(
    count: int, *, seed: int = 0, num_rejected: int = 0, caption: str | None = "picture {}", digests=None, source_of=None, sources=None
) -> Manifest:
    """`count` pictures of log-normal sizes around a megapixel, with random digests and one caption each.

    `caption=None` leaves them without. `digests` (n, 16) and `source_of` (n,) replace those that are made up.
    """
    names = [f"pictures/{row:08}.jpg" for row in range(count)]
    rng = np.random.Generator(np.random.Philox(key=seed))
    if digests is None:
        digests = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    area, aspect = np.exp(rng.normal(np.log(1.2e6), 0.7, count)), np.exp(rng.normal(0, 0.35, count))
    captions = [] if caption is None else [caption.format(row) for row in range(count)]
    starts = np.arange(count + 1, dtype=np.int32) if caption is not None else np.zeros(count + 1, np.int32)
    columns = {
        "name": pa.array(names, pa.string()),
        "path": pa.array([f"/{name}".encode() for name in names], pa.binary()),
        "start": pa.array(np.zeros(count, np.int64)),
        "length": pa.array(np.full(count, -1, np.int64)),
        "column": pa.array([b""] * count, pa.binary()),
        "digest": bytes_column(np.asarray(digests, np.uint8).reshape(-1, 16)),
        "height": pa.array(np.maximum(64, np.sqrt(area / aspect)).astype(np.int32)),
        "width": pa.array(np.maximum(64, np.sqrt(area * aspect)).astype(np.int32)),
        "is_reducible": pa.array(np.ones(count, bool)),
        "captions": pa.ListArray.from_arrays(pa.array(starts), pa.array(captions, pa.string())),
        "source": pa.array(np.zeros(count, np.int16) if source_of is None else np.asarray(source_of, np.int16)),
        "mask_path": pa.nulls(count, pa.binary()),
        "mask_start": pa.nulls(count, pa.int64()),
        "mask_length": pa.nulls(count, pa.int64()),
        "mask_column": pa.nulls(count, pa.binary()),
        "mask_digest": pa.nulls(count, pa.binary(16)),
    }
    rejected = tuple(Rejected(f"bad{row}.png", "is broken") for row in range(num_rejected))
    table = pa.table([columns[name] for name in COLUMNS], names=list(COLUMNS))
    return Manifest(table, tuple(sources or [Source(FOLDER, repeats=Fraction(1))]), rejected)
