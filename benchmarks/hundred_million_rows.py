"""Buckets and the order of one epoch for a hundred million pictures: `python benchmarks/hundred_million_rows.py [ROWS]`."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np

from aquatint.data.bucket_sets import bucket_sets
from aquatint.data.buckets import plan
from aquatint.data.sampler import Group, Order

LIMIT_SECONDS, LIMIT_BYTES = 60.0, 4e9
BATCH_SIZE = 256


def sizes(rows: int) -> np.ndarray:
    """Log-normal areas and aspects, (n, 2) int32, made in portions."""
    made = np.empty((rows, 2), dtype=np.int32)
    random = np.random.default_rng(0)
    for start in range(0, rows, 1 << 20):
        part = made[start : start + (1 << 20)]
        area, aspect = np.exp(random.normal(14.0, 0.5, len(part))), np.exp(random.normal(0.0, 0.35, len(part)))
        part[:, 0], part[:, 1] = np.sqrt(area / aspect), np.sqrt(area * aspect)
    return made


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000_000
    pictures, repeats = sizes(rows), np.ones(rows, dtype=np.float32)
    offered = bucket_sets("aquatint", resolution=1024, step=32, min_side=512, max_side=2048, max_aspect=4.0, area_weight=0.5)
    started, processor = time.perf_counter(), time.process_time()
    buckets = plan(pictures, repeats, offered, min_count=BATCH_SIZE)
    planned = time.perf_counter() - started
    counts = np.bincount(buckets.assignment, minlength=len(buckets.shapes))
    order = Order(0, tuple((Group(int(count)),) for count in counts), BATCH_SIZE)
    seen = 0
    for bucket in range(len(counts)):  # every lap of the first epoch, as the loader would come to need them
        seen += len(order._rows_of(bucket, 0))
    order.batch(0)
    seconds, core_seconds = time.perf_counter() - started, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {
        "rows": rows, "buckets": len(counts), "rows_ordered": seen, "plan_seconds": round(planned, 2), "seconds": round(seconds, 2),
        "core_seconds": round(core_seconds, 2), "peak_bytes": peak, "limits": {"seconds": LIMIT_SECONDS, "bytes": LIMIT_BYTES},
        "met": seconds < LIMIT_SECONDS and peak < LIMIT_BYTES, "python": platform.python_version(), "numpy": np.__version__,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"hundred_million_rows_cpu_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
