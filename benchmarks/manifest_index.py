"""In which format should the index of a million pictures be kept, and how fast does a run start with it?

    python benchmarks/manifest_index.py [--rows 1000000] [--files 1000000]

writes the same rows as an Arrow file (ours: a stream with a checksum, mapped), as Parquet and as an SQLite table, and
measures each question in a process of its own, several times in turns: opening; all sizes and digests as arrays; looking up
every picture of an unchanged listing; a thousand single pictures; replacing 1 % of the rows. "Cold" is after the file's pages
were given up. Then it makes a folder of so many tiny pictures with captions, and scans it for the first and the second time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aquatint.data.index import SCHEMA, IndexWriter, Lookup, bytes_column, fixed_bytes, load_index, split_by_reason, take
from aquatint.data.manifest import scan
from aquatint.data.places import Opener
from aquatint.data.sources.listing import Source
from aquatint.storage import atomic_file

ROUNDS = 5
ROWS_AT_ONCE = 8192
RESULTS = Path(__file__).parent / "results"
FORMATS = ("arrow", "parquet", "sqlite")
QUESTIONS = ("open", "open_cold", "sizes_and_digests", "look_up_all", "thousand_pictures", "update_1_percent")
SQL_COLUMNS = ", ".join(name + (" BLOB" if pa.types.is_binary(kind) else "") for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True))


def rows(count: int) -> pa.Table:
    """Pictures as a large collection has them: paths of 60 bytes, captions of 120."""
    rng = np.random.Generator(np.random.Philox(key=0))
    keys = {name: bytes_column(rng.integers(1, 256, (count, 16), dtype=np.uint8)) for name in ("stamp", "picture_stamp", "digest")}
    sides = np.exp(rng.normal(7, 0.4, (count, 2))).astype(np.int32)
    words = np.array(
        ["a", "fox", "in", "the", "snow", "under", "pine", "trees", "at", "night", "soft", "light", "painted", "by", "hand", "wide"]
    )
    picks = rng.integers(0, len(words), (count, 24))
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1, dtype=np.int32)), pa.array([" ".join(words[pick]) for pick in picks], pa.string())
    )
    columns = {
        **keys,
        "name": pa.array([f"collection/part {row // 10_000:04}/{row:08} a picture.jpg" for row in range(count)]),
        "path": pa.array([f"/data/sets/collection/part {row // 10_000:04}/{row:08} a picture.jpg".encode() for row in range(count)]),
        "start": pa.array(np.zeros(count, np.int64)), "length": pa.array(np.full(count, -1, np.int64)),
        "column": pa.array([b""] * count),
        "mask_stamp": bytes_column(np.zeros((count, 16), np.uint8)),
        "captions": lists, "height": pa.array(sides[:, 0]), "width": pa.array(sides[:, 1]),
        "notices": pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.string())),
        "remarks": pa.ListArray.from_arrays(pa.array(np.zeros(count + 1, np.int32)), pa.array([], pa.string())),
    }  # fmt: skip
    return pa.table([columns.get(field.name, pa.nulls(count, field.type)) for field in SCHEMA], schema=SCHEMA)


# Writing


def write_arrow(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as file:
        writer = IndexWriter(file)
        for start in range(0, len(table), ROWS_AT_ONCE):
            writer.add(*split_by_reason(table.slice(start, ROWS_AT_ONCE)))
        writer.finish({})


def write_parquet(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as file:
        pq.write_table(table, file, compression="zstd", row_group_size=ROWS_AT_ONCE * 8, write_page_checksum=True)


def sql_rows(table: pa.Table):
    for batch in table.to_batches(ROWS_AT_ONCE):
        for row in batch.to_pylist():
            yield [json.dumps(value) if isinstance(value, list) else value for value in row.values()]


def write_sqlite(path: Path, table: pa.Table) -> None:
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as database:
        database.execute(f"CREATE TABLE pictures (id INTEGER PRIMARY KEY, {SQL_COLUMNS})")
        database.executemany(f"INSERT INTO pictures VALUES (NULL{', ?' * len(SCHEMA)})", sql_rows(table))
        database.execute("CREATE INDEX by_stamp ON pictures (stamp)")
    database.close()


# Reading. Each opens the file as a start would: checked, as far as the format can be


def open_arrow(path: Path) -> pa.Table:
    index = load_index(path)
    assert index is not None
    return index.used


def open_parquet(path: Path) -> pq.ParquetFile:
    return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)


def open_sqlite(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path)
    database.execute("SELECT count(*) FROM (SELECT 1 FROM pictures LIMIT 1)").fetchone()
    return database


def columns(kind: str, opened, names: list[str]) -> pa.Table:
    if kind == "arrow":
        return opened.select(names)
    if kind == "parquet":
        return opened.read(names)
    raise ValueError(kind)


def sizes_and_digests(kind: str, opened) -> tuple[np.ndarray, np.ndarray]:
    if kind == "sqlite":
        found = opened.execute("SELECT height, width, digest FROM pictures ORDER BY id").fetchall()
        return np.array([row[:2] for row in found], np.int32), np.frombuffer(b"".join(row[2] for row in found), np.uint8).reshape(-1, 16)
    table = columns(kind, opened, ["height", "width", "digest"])
    return np.stack([table["height"].to_numpy(), table["width"].to_numpy()], axis=1), fixed_bytes(table["digest"])


def look_up_all(kind: str, opened, wanted: np.ndarray) -> int:
    """All stamps of a listing, in its portions."""
    portions = [wanted[start : start + ROWS_AT_ONCE] for start in range(0, len(wanted), ROWS_AT_ONCE)]
    if kind == "sqlite":
        find = "SELECT id FROM pictures WHERE stamp = ?"
        return sum(opened.execute(find, (stamp.tobytes(),)).fetchone() is not None for portion in portions for stamp in portion)
    lookup = Lookup(fixed_bytes(columns(kind, opened, ["stamp"])["stamp"]))
    return sum(int((lookup.find(portion) >= 0).sum()) for portion in portions)


def thousand_pictures(kind: str, opened, places: np.ndarray) -> int:
    if kind == "sqlite":
        return sum(len(opened.execute("SELECT * FROM pictures WHERE id = ?", (int(place) + 1,)).fetchone()) > 0 for place in places)
    if kind == "arrow":
        return sum(len(opened.slice(int(place), 1).to_pylist()) for place in places)
    groups = np.arange(opened.num_row_groups) * ROWS_AT_ONCE * 8  # a place is found by its group, which is read as a whole
    return sum(
        len(opened.read_row_group(int(group)).slice(int(place - groups[group]), 1).to_pylist())
        for place in places[:2]
        for group in [np.searchsorted(groups, place, side="right") - 1]
    )


def update(kind: str, opened, path: Path, places: np.ndarray) -> None:
    """1 % of the rows get another digest, and the file is whole and durable afterwards."""
    new = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (len(places), 16), dtype=np.uint8)
    if kind == "sqlite":
        with opened:
            opened.executemany(
                "UPDATE pictures SET digest = ? WHERE id = ?", ((new[i].tobytes(), int(place) + 1) for i, place in enumerate(places))
            )
        return
    table = opened if kind == "arrow" else opened.read()
    changed = take(table, places)
    number = SCHEMA.get_field_index("digest")
    table = pa.concat_tables([table, changed.set_column(number, "digest", bytes_column(new))])
    order = np.arange(len(table) - len(places))
    order[places] = len(table) - len(places) + np.arange(len(places))
    if kind == "parquet":
        write_parquet(path, take(table, order))
        return
    with atomic_file(path) as file:
        writer = IndexWriter(file)
        for start in range(0, len(order), ROWS_AT_ONCE):
            writer.add(*split_by_reason(take(table, order[start : start + ROWS_AT_ONCE])))
        writer.finish({})


# Measuring


def memory_mib() -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_mib": int(status["VmHWM"].split()[0]) >> 10, "own_mib": int(status["RssAnon"].split()[0]) >> 10}


def measure(kind: str, question: str, path: Path) -> dict[str, float]:
    """One question, in this process. `own_mib` is what cannot be given back to the system when others need it."""
    opener = {"arrow": open_arrow, "parquet": open_parquet, "sqlite": open_sqlite}[kind]
    wanted = np.load(path.parent / "stamps.npy") if question == "look_up_all" else np.empty(0)
    count = int((path.parent / "count").read_text())
    places = np.sort(
        np.random.Generator(np.random.Philox(key=2)).choice(count, 1000 if question == "thousand_pictures" else count // 100, replace=False)
    )
    if question == "open_cold":
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = memory_mib()
    start = time.perf_counter()
    opened = opener(path)
    if not question.startswith("open"):
        start = time.perf_counter()
    asked: dict[str, Callable[[], object]] = {
        "sizes_and_digests": lambda: sizes_and_digests(kind, opened),
        "look_up_all": lambda: look_up_all(kind, opened, wanted),
        "thousand_pictures": lambda: thousand_pictures(kind, opened, places),
        "update_1_percent": lambda: update(kind, opened, path, places),
    }
    kept = asked[question]() if question in asked else None
    seconds = time.perf_counter() - start
    if kind == "parquet" and question == "thousand_pictures":
        seconds *= 500  # only two were asked for
    after = memory_mib()
    del kept
    return {"seconds": seconds, **{name: after[name] - before[name] for name in after}}


def in_own_process(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def compare(folder: Path, count: int) -> dict[str, object]:
    table = rows(count)
    np.save(folder / "stamps.npy", fixed_bytes(table["stamp"]))
    (folder / "count").write_text(str(count))
    writers = {"arrow": write_arrow, "parquet": write_parquet, "sqlite": write_sqlite}
    results: dict[str, dict[str, object]] = {}
    for kind in FORMATS:
        start = time.perf_counter()
        writers[kind](folder / kind, table)
        seconds = time.perf_counter() - start
        results[kind] = {"write_seconds": round(seconds, 2), "bytes_per_row": round((folder / kind).stat().st_size / count)}
    del table
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(ROUNDS):
        for kind in FORMATS:
            for question in QUESTIONS:
                runs.setdefault((kind, question), []).append(in_own_process("--ask", kind, question, str(folder / kind)))
    for (kind, question), found in runs.items():
        middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
        results[kind][question] = {
            "seconds": round(middle["seconds"], 4),
            **{name: round(middle[name]) for name in ("peak_mib", "own_mib")},
        }
    return results


# A folder of real files


def make_pictures(folder: Path, count: int) -> None:
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 32, 24, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(24 * 33))), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    for start in range(0, count, 1000):
        part = folder / f"{start // 1000:04}"
        part.mkdir(parents=True)
        for number in range(start, min(start + 1000, count)):
            (part / f"{number:07}.png").write_bytes(png + number.to_bytes(4, "big"))
            (part / f"{number:07}.txt").write_text(f"picture number {number}, of nothing in particular, but with a caption of some length")


def scan_once(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    manifest = scan([Source(str(folder / "pictures"))], opener=Opener(), max_pixels=10**8, index_folder=folder / "index", quarantine={})
    seconds = time.perf_counter() - start
    digests = manifest.digests
    return {
        "seconds": seconds, "used": len(digests), "read": manifest.num_read, **memory_mib(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }  # fmt: skip


def scan_folder(folder: Path, count: int) -> dict[str, object]:
    make_pictures(folder / "pictures", count)
    found = {name: in_own_process("--scan", str(folder)) for name in ("first", "second")}
    for path in sorted((folder / "pictures").rglob("*7.txt")):  # every tenth caption
        path.write_text("another caption")
    found["a_tenth_of_the_captions_changed"] = in_own_process("--scan", str(folder))
    return {name: {key: round(value, 2) for key, value in one.items()} for name, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--ask", nargs=3)
    parser.add_argument("--scan")
    arguments = parser.parse_args()
    if arguments.ask:
        kind, question, path = arguments.ask
        print(json.dumps(measure(kind, question, Path(path))))
        return
    if arguments.scan:
        print(json.dumps(scan_once(Path(arguments.scan))))
        return
    result: dict[str, object] = {"python": platform.python_version(), "pyarrow": pa.__version__, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        result |= {"rows": arguments.rows, "rounds": ROUNDS, "formats": compare(Path(name), arguments.rows)}
    with tempfile.TemporaryDirectory() as name:
        result |= {"files": arguments.files, "scans": scan_folder(Path(name), arguments.files)}
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"manifest_index_cpu_{datetime.now(UTC):%Y-%m-%d}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
