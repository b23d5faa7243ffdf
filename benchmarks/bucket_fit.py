"""How much do aspect-ratio buckets crop, ours and those of others; and how long does planning take?

    python benchmarks/bucket_fit.py            what is cropped, in whole sets and in small ones
    python benchmarks/bucket_fit.py --scale    seconds and memory for a million to a hundred million pictures

The first draws 20,000 pictures larger than any bucket, log-uniform in aspect from 0.4 to 2.5, and puts them into buckets of one
megapixel by each method. Cropped is the share of the picture's area that is lost, used is the bucket's area / 1024^2. The others'
algorithms are written anew here, from their descriptions, a few lines each. It fails if a figure is not the one on record.
The second measures each size in fresh processes, in turns with a plain loop over the pictures as sd-scripts has it.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from aquatint.data.bucket_sets import BucketSet, aspects_of, bucket_sets
from aquatint.data.buckets import fit_loss, plan

RESULTS = Path(__file__).parent / "results"
PICTURES, AREA = 20_000, 1024**2
Place = Callable[[np.ndarray], np.ndarray]  # sizes (n, 2) -> bucket shapes (n, 2)
RECORD = {  # mean cropped and 95 % quantile in %, mean area used, buckets: as measured when the method was designed
    "sd-scripts, NovelAI 64": (2.91, 5.97, 0.972, 19),
    "sd-scripts 32": (1.46, 3.01, 0.981, 37),
    "SDXL paper's table": (2.15, 5.61, 0.957, 26),
    "OneTrainer 64": (4.69, 9.85, 0.992, 11),
    "SimpleTuner 64": (2.40, 5.23, 0.998, 30),
    "aquatint 64": (1.97, 4.91, 0.962, 31),
    "aquatint 32": (1.02, 2.60, 0.976, 61),
    "aquatint 32, area_weight 0.25": (0.77, 1.82, 0.969, 69),
}
TOLERANCE = (0.06, 0.2, 0.0015, 1)
OURS = ("aquatint 64", "aquatint 32", "aquatint 32, area_weight 0.25")


# The methods


def sd_scripts(step: int) -> Place:
    """For each width the longest height within the area, both ways round, and a square; nearest width / height."""
    shapes = {(1024, 1024)}
    for width in range(512, 2049, step):
        height = min(2048, AREA // width // step * step)
        shapes |= {(height, width), (width, height)} if height >= 512 else set()
    return nearest(np.array(sorted(shapes)), lambda sizes: sizes[:, 1] / sizes[:, 0])


def table() -> Place:
    """The 40 sizes of appendix I, nearest in the logarithm."""
    (found,) = ours("sdxl_table")
    return nearest(found.shapes, lambda sizes: np.log(sizes[:, 1] / sizes[:, 0]))


def one_trainer() -> Place:
    """Nine ratios both ways round, sides rounded to 64, so that the area may be exceeded; nearest height / width."""
    ratios = np.array([1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4])
    tall = (np.round(1024 * np.stack([np.sqrt(ratios), 1 / np.sqrt(ratios)], axis=1) / 64) * 64).astype(int)
    return nearest(np.unique(np.concatenate([tall, tall[:, ::-1]]), axis=0), lambda sizes: sizes[:, 0] / sizes[:, 1])


def simple_tuner(sizes: np.ndarray) -> np.ndarray:
    """A shape of its own for every aspect, which is rounded to two digits; sides rounded to 64."""
    aspect = np.round(sizes[:, 1] / sizes[:, 0], 2)
    return (np.round(1024 * np.stack([1 / np.sqrt(aspect), np.sqrt(aspect)], axis=1) / 64) * 64).astype(int)


def nearest(shapes: np.ndarray, measure: Callable[[np.ndarray], np.ndarray]) -> Place:
    return lambda sizes: shapes[np.abs(measure(sizes)[:, None] - measure(shapes)).argmin(axis=1)]


def ours(name: str = "aquatint", step: int = 32, area_weight: float = 0.5) -> tuple[BucketSet, ...]:
    limits = {"resolution": 1024, "step": step, "min_side": 512, "max_side": 2048, "max_aspect": 4.0}
    return bucket_sets(name, **limits, area_weight=area_weight)  # type: ignore[arg-type]


def planned(step: int = 32, area_weight: float = 0.5, min_count: int = 1) -> Place:
    def place(sizes: np.ndarray) -> np.ndarray:
        result = plan(sizes, np.ones(len(sizes)), ours(step=step, area_weight=area_weight), min_count=min_count)
        return result.shapes[result.assignment]

    return place


def greedy(min_count: int) -> Place:
    """What ours was before: the smallest bucket is dissolved into its pictures' next-best ones, until all are full."""

    def place(sizes: np.ndarray) -> np.ndarray:
        (found,) = ours()
        used, aspects = np.arange(len(found)), aspects_of(sizes)
        while True:
            left = found.only(used)
            chosen = left.cheapest(aspects)
            counts = np.bincount(chosen, minlength=len(used))
            if min(counts[counts > 0]) >= min_count or np.count_nonzero(counts) == 1:
                return left.shapes[chosen]
            used = used[counts > 0]
            used = np.delete(used, counts[counts > 0].argmin())

    return place


def methods() -> dict[str, Place]:
    return {
        "sd-scripts, NovelAI 64": sd_scripts(64), "sd-scripts 32": sd_scripts(32), "SDXL paper's table": table(),
        "OneTrainer 64": one_trainer(), "SimpleTuner 64": simple_tuner, "aquatint 64": planned(step=64), "aquatint 32": planned(),
        "aquatint 32, area_weight 0.25": planned(area_weight=0.25),
    }  # fmt: skip


# What is cropped


def draw(count: int, seed: int = 0) -> np.ndarray:
    aspect = np.exp(np.random.default_rng(seed).uniform(np.log(0.4), np.log(2.5), count))
    return np.stack([4000 / np.sqrt(aspect), 4000 * np.sqrt(aspect)], axis=1).round().astype(np.int64)


def figures(sizes: np.ndarray, place: Place) -> dict[str, float]:
    shapes = place(sizes)
    cropped, _ = fit_loss(sizes, shapes)
    _, counts = np.unique(shapes, axis=0, return_counts=True)
    used = shapes.prod(axis=1) / AREA
    return {
        "mean_cropped_percent": round(100 * cropped.mean(), 3), "p95_cropped_percent": round(100 * np.quantile(cropped, 0.95), 3),
        "mean_used": round(used.mean(), 4), "max_used": round(used.max(), 4), "buckets": len(counts),
        "smallest_bucket": int(counts.min()), "pictures_in_short_buckets": int(counts[counts < 16].sum()),
    }  # fmt: skip


def whole_sets() -> dict[str, dict[str, float]]:
    """All methods, and ours with a minimum that the rare aspects do not reach."""
    sizes = draw(PICTURES)
    filled = {f"aquatint 32, every bucket {count} or more": planned(min_count=count) for count in (256, 512, 1024)}
    return {name: figures(sizes, place) for name, place in (methods() | filled).items()}


def small_sets(count: int, min_count: int = 16, rounds: int = 20) -> dict[str, dict[str, float]]:
    """The same with few pictures, means over several draws: here it matters that buckets are full."""
    chosen = methods() | {"aquatint 32, greedy, full": greedy(min_count), "aquatint 32, full": planned(min_count=min_count)}
    found = {}
    for name, place in chosen.items():
        rows = [figures(draw(count, seed), place) for seed in range(rounds)]
        found[name] = {key: round(statistics.mean(row[key] for row in rows), 3) for key in rows[0]}
    return found


def check(found: dict[str, dict[str, float]]) -> list[str]:
    """What differs from the record, and where ours is not ahead of a method with the same step."""
    columns = ("mean_cropped_percent", "p95_cropped_percent", "mean_used", "buckets")
    problems = []
    for name, record in RECORD.items():
        for column, expected, tolerance in zip(columns, record, TOLERANCE, strict=True):
            if abs(found[name][column] - expected) > tolerance:
                problems.append(f"{name}: {column} is {found[name][column]}, on record {expected}")
    for name in RECORD:
        best = "aquatint 32" if name.endswith("32") else "aquatint 64"
        if name not in OURS and found[best]["mean_cropped_percent"] >= found[name]["mean_cropped_percent"]:
            problems.append(f"{best} crops no less than {name}")
    return problems


def markdown(found: dict[str, dict[str, float]], *, short: bool = False) -> str:
    head = "| method | mean cropped | 95 % | mean area used | buckets |" + (" pictures in buckets below 16 |" if short else "")
    lines = [head, "|---" * (head.count("|") - 1) + "|"]
    for name, row in found.items():
        most = f" (up to {row['max_used']:.2f})" if row["max_used"] > 1 else ""
        lines.append(
            f"| {name} | {row['mean_cropped_percent']:.2f} % | {row['p95_cropped_percent']:.2f} % | {row['mean_used']:.3f}{most} |"
            f" {row['buckets']:g} |" + (f" {row['pictures_in_short_buckets']:g} |" if short else "")
        )
    return "\n".join(lines)


# How long it takes


def measure(kind: str, count: int) -> dict[str, float]:
    """Seconds of planning, and the process's largest memory before and after; sizes are random, so hardly two are equal.

    On a machine with other work to do, the seconds of one core say more than those on the clock.
    """
    rng = np.random.default_rng(0)
    sizes = np.empty((count, 2), dtype=np.int32)
    for start in range(0, count, 1 << 22):
        sizes[start : start + (1 << 22)] = rng.integers(600, 6000, sizes[start : start + (1 << 22)].shape, dtype=np.int32)
    repeats = np.ones(count, dtype=np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    started, worked = time.perf_counter(), time.process_time()
    if kind == "loop":
        loop_over(sizes)
    else:
        plan(sizes, repeats, ours(), min_count=64 if kind == "full" else count / 50, max_upscale=4.0)
    seconds = {"seconds": time.perf_counter() - started, "core_seconds": time.process_time() - worked}
    return {**seconds, "before_gib": before, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def loop_over(sizes: np.ndarray) -> list[tuple[int, int]]:
    """A shape for each picture, one after the other: sd-scripts' BucketManager.select_bucket."""
    shapes = [tuple(shape) for shape in sd_scripts(64)(np.array([[height, 1000] for height in range(100, 10_000)])).tolist()]
    shapes = sorted(set(shapes))
    aspects, known, found = np.array([width / height for height, width in shapes]), set(shapes), []
    for height, width in sizes.tolist():
        found.append((height, width) if (height, width) in known else shapes[np.abs(aspects - width / height).argmin()])
    return found


def scale(rounds: int = 5) -> dict[str, dict[str, float]]:
    """Medians over `rounds` turns: `full` buckets as they are, `merged` where each must hold a fiftieth of the pictures."""
    cases = [(kind, count) for count in (10**6, 10**7, 10**8) for kind in ("full", "merged", "loop") if kind != "loop" or count == 10**6]
    rows: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for kind, count in cases:
            command = [sys.executable, __file__, "--measure", kind, str(count)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.setdefault(f"{kind} {count:,}", []).append(json.loads(answer))
    return {
        name: {
            "seconds": round(statistics.median(row["seconds"] for row in found), 2),
            "core_seconds": round(statistics.median(row["core_seconds"] for row in found), 2),
            "most_core_seconds": round(max(row["core_seconds"] for row in found), 2),
            "pictures_gib": round(found[0]["before_gib"], 2), "peak_gib": round(max(row["peak_gib"] for row in found), 2),
        }
        for name, found in rows.items()
    }  # fmt: skip


def save(name: str, result: dict[str, object]) -> None:
    RESULTS.mkdir(exist_ok=True)
    machine = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    text = json.dumps(machine | result, indent=2) + "\n"
    (RESULTS / f"{name}_cpu_{datetime.now(UTC):%Y-%m-%d}.json").write_text(text)


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], int(sys.argv[3]))))
    elif sys.argv[1:] == ["--scale"]:
        found = scale()
        save("bucket_scale", {"load": os.getloadavg(), "planning": found})
        print("| buckets | seconds | of one core | at most | the pictures' sizes | peak |\n|---|---|---|---|---|---|")
        for name, row in found.items():
            seconds = f"{row['seconds']:.2f} | {row['core_seconds']:.2f} | {row['most_core_seconds']:.2f}"
            print(f"| {name} | {seconds} | {row['pictures_gib']:.2f} GiB | {row['peak_gib']:.2f} GiB |")
    else:
        whole, small = whole_sets(), {str(count): small_sets(count) for count in (300, 1000)}
        problems = check(whole)
        save("bucket_fit", {"pictures": PICTURES, "whole": whole, "small": small, "problems": problems})
        print(f"{PICTURES:,} pictures\n\n{markdown(whole)}")
        for count, found in small.items():
            print(f"\n{count} pictures, batches of 16\n\n{markdown(found, short=True)}")
        if problems:
            sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
