"""How long does the order of an epoch take, and how much memory, for a million to a hundred million pictures?

    python benchmarks/order_scale.py

puts the pictures into 61 buckets as a real set fills them (a bell over the aspect ratios, and a fifth square) and asks `Order`
for batches until every bucket has been asked: so all laps of the epoch and the order of its batches have been made. The
reference draws `numpy.random.Generator.permutation` for every bucket and for the batches, which is the least that any trainer
does, and can neither be asked for a later epoch nor for fractional repeats. The two are measured in turns, each time in a fresh
process.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import numpy as np

from aquatint.data.sampler import Group, Order

SIZES, BUCKETS, BATCH_SIZE, ROUNDS = (10**6, 10**7, 10**8), 61, 16, 5
MIXED = ((0.9, Fraction(1)), (0.1, Fraction(5, 2)))  # shares of the pictures and their repeats: the rest costs what it must
RESULTS = Path(__file__).parent / "results"


def counts(total: int) -> list[int]:
    bell = np.exp(-(np.linspace(-2.5, 2.5, BUCKETS) ** 2) / 2)
    bell *= 0.8 / bell.sum()
    bell[BUCKETS // 2] += 0.2
    return [int(share * total) for share in bell]


def plain(total: int) -> Order:
    return Order(0, tuple((Group(count),) for count in counts(total)), BATCH_SIZE)


def mixed(total: int) -> Order:
    return Order(0, tuple(tuple(Group(int(share * count), repeats) for share, repeats in MIXED) for count in counts(total)), BATCH_SIZE)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ask_all_buckets(order: Order, epoch: int) -> None:
    """Asks an epoch's batches until each bucket has been asked: the later ones of an epoch find everything made."""
    first, missing = order.batches_before_epoch(epoch), set(range(BUCKETS))
    while missing:
        missing.discard(order.batch(first)[0])
        first += 1


def ours(order: Order) -> dict[str, float]:
    first = order.batches_before_epoch(1)
    result = {
        "first_epoch_s": seconds(lambda: ask_all_buckets(order, 0)),
        "next_epoch_s": seconds(lambda: ask_all_buckets(order, 1)),
        "batch_us": seconds(lambda: [order.batch(index) for index in range(first, first + 10_000)]) * 100,
    }
    result["peak_mb"] = peak_mb()
    fresh = Order(order.seed, order.buckets, order.batch_size)
    return result | {"resume_s": seconds(lambda: ask_all_buckets(fresh, 1001))}


def reference(total: int) -> dict[str, float]:
    random = np.random.default_rng(0)

    def shuffle() -> list[object]:
        rows = [random.permutation(count) for count in counts(total)]
        return [rows, random.permutation(sum(len(part) // BATCH_SIZE for part in rows))]

    return {"first_epoch_s": seconds(shuffle), "peak_mb": peak_mb()}


def peak_mb() -> float:
    """Of this process so far, without what the interpreter and numpy take: megabytes."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - BASELINE_KB) / 1000


BASELINE_KB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
METHODS: dict[str, Callable[[int], dict[str, float]]] = {
    "ours": lambda total: ours(plain(total)),
    "ours, a tenth with 2.5 repeats": lambda total: ours(mixed(total)),
    "numpy permutations": reference,
}


def in_fresh_process(method: str, total: int) -> dict[str, float]:
    output = subprocess.run([sys.executable, __file__, method, str(total)], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output))


def summary(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {"min": round(values[0], 3), "median": round(statistics.median(values), 3), "max": round(values[-1], 3)}
        for name in rounds[0]
        for values in [sorted(found[name] for found in rounds)]
    }


def main() -> None:
    result: dict[str, object] = {
        "python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine(),
        "buckets": BUCKETS, "batch_size": BATCH_SIZE, "rounds": ROUNDS,
    }  # fmt: skip
    for total in SIZES:
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(ROUNDS):
            for method, rounds in found.items():
                rounds.append(in_fresh_process(method, total))
        result[f"{total:,} pictures"] = {method: summary(rounds) for method, rounds in found.items()}
        print(json.dumps({f"{total:,} pictures": result[f"{total:,} pictures"]}, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"order_scale_cpu_{datetime.now(UTC):%Y-%m-%d}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(METHODS[sys.argv[1]](int(sys.argv[2]))))
    else:
        main()
