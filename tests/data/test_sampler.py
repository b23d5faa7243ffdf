"""Order is a function: every property is checked on small numbers, and one table of golden values pins it for good."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.data.sampler import Order, permutation

ORDERS = st.builds(
    Order,
    seed=st.integers(0, 2**63 - 1),
    counts=st.lists(st.integers(1, 23), min_size=1, max_size=5).map(tuple),
    batch_size=st.integers(1, 9),
)
PROPERTY = settings(max_examples=60, deadline=None)


def streams(order: Order, num_epochs: int) -> list[list[int]]:
    """The samples of each bucket, in the order of its own batches, over some epochs."""
    first, last = [0], [order.batches_before_epoch(epoch) for epoch in range(1, num_epochs + 1)]
    first += last[:-1]
    seen: list[dict[int, tuple[int, ...]]] = [{} for _ in order.counts]
    for start, end in zip(first, last, strict=True):
        for index in range(start, end):
            bucket, items = order.batch(index)
            seen[bucket][place_of(order, bucket, items, len(seen[bucket]))] = items
    return [[item for place in sorted(batches) for item in batches[place]] for batches in seen]


def place_of(order: Order, bucket: int, items: tuple[int, ...], near: int) -> int:
    """Which batch of the bucket's endless stream this is, found by comparing."""
    count, size = order.counts[bucket], order.batch_size
    for place in range(max(0, near - count - 1), near + count + 2):
        laps = (divmod(position, count) for position in range(place * size, (place + 1) * size))
        if items == tuple(int(permutation(order.seed, f"lap/{bucket}", lap, count)[offset]) for lap, offset in laps):
            return place
    raise AssertionError(f"{items} is no batch of bucket {bucket}")
