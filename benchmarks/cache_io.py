"""How fast is the cache written and read, next to the ways other trainers keep theirs?

    taskset -c 0 python -m benchmarks.cache_io [FOLDER]

keeps the same samples (mean and standard deviation 8x128x128, text 77x2048 + 1280, float16, random) in our shards, in an
npz per picture and one per caption as sd-scripts does (latents in float32), in a .pt each as SimpleTuner does, back to back
in one file, in an Arrow file that is mapped into memory, and, if webdataset is there (`pip install webdataset`), in its tar
files, which can only be read from front to back. MosaicML's streaming is left out: it wants older releases of torch, numpy
and transformers than those this package is tested with. All of them are read in turns by one process, in a new random order
every round, from warm and from cold files; what is read is a dict of tensors. Ours proves a checksum each time; npz checks
a CRC; the others check nothing. Files are written in turns too; only ours are certain to be on the disk when the clock stops.
FOLDER is for scratch (3 GB). Everything is timed by the clock and by the processor time of this process; where files are
warm, an idle machine gives the same twice, and on a busy one the latter is the one to look at.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
import xxhash

from aquatint.data.shard_index import Field, Layout, ShardIndex, save_index
from aquatint.data.shards import ShardStore
from benchmarks.machine import has, load

SAMPLES, ENTRIES_PER_SHARD, BATCH, ROUNDS, SLOW_ROUNDS = 600, 128, 16, 9, 5
INDEX_ENTRIES, INDEX_SHARDS = 1_000_000, 4000
RESULTS = Path(__file__).parent / "results"

Lap = Callable[[list[int]], None]
KEYS = [hashlib.blake2b(number.to_bytes(4), digest_size=16).digest() for number in range(SAMPLES)]


class Seconds(NamedTuple):
    clock: float
    processor: float


class Content:
    """The samples, in memory."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.latents = torch.randn(SAMPLES, 8, 128, 128).half()
        self.embeds = torch.randn(SAMPLES, 77, 2048).half()
        self.pooled = torch.randn(SAMPLES, 1280).half()
        self.sample_bytes = sum(column[0].nbytes for column in self.columns.values())

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        return {"moments": self.latents, "prompt_embeds": self.embeds, "pooled": self.pooled}

    def latent_entry(self, number: int) -> dict[str, torch.Tensor]:
        return {"moments": self.latents[number]}

    def text_entry(self, number: int) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": self.embeds[number], "pooled": self.pooled[number]}

    def packed(self, number: int) -> bytes:
        return b"".join(column[number].numpy().tobytes() for column in self.columns.values())


# Ways to write


def write_shards(folder: Path, content: Content) -> None:
    latents, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    for start in range(0, SAMPLES, ENTRIES_PER_SHARD):
        numbers = range(start, min(start + ENTRIES_PER_SHARD, SAMPLES))
        latents.write({KEYS[number]: content.latent_entry(number) for number in numbers})
        texts.write({KEYS[number]: content.text_entry(number) for number in numbers})
    latents.save_index()
    texts.save_index()


def write_npz(folder: Path, content: Content, number_type: torch.dtype, *, safe: bool = False) -> None:
    """With `safe`, every file is on the disk before the next is written, as with ours every shard is."""
    folder.mkdir()
    for number in range(SAMPLES):
        latents = content.latents[number].to(number_type).numpy()
        np.savez(folder / f"{number}.npz", latents=latents, original_size=np.array([1024, 1024]), crop_ltrb=np.array([0, 0, 1024, 1024]))
        one, two = content.embeds[number, :, :768].numpy(), content.embeds[number, :, 768:].numpy()
        np.savez(folder / f"{number}_te_outputs.npz", hidden_state1=one, hidden_state2=two, pool2=content.pooled[number].numpy())
        for name in (f"{number}.npz", f"{number}_te_outputs.npz") if safe else ():
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())


def write_pt(folder: Path, content: Content) -> None:
    folder.mkdir()
    for number in range(SAMPLES):
        torch.save({name: tensor.clone() for name, tensor in content.latent_entry(number).items()}, folder / f"{number}.pt")
        torch.save({name: tensor.clone() for name, tensor in content.text_entry(number).items()}, folder / f"{number}_te.pt")


def write_bare(folder: Path, content: Content) -> None:
    folder.mkdir()
    with (folder / "packed").open("wb") as file:
        for number in range(SAMPLES):
            file.write(content.packed(number))


def write_arrow(folder: Path, content: Content) -> None:
    folder.mkdir()
    schema = pa.schema([(name, pa.binary(column[0].nbytes)) for name, column in content.columns.items()])
    with pa.OSFile(str(folder / "samples.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, SAMPLES, ENTRIES_PER_SHARD):
            numbers = range(start, min(start + ENTRIES_PER_SHARD, SAMPLES))
            columns = [[column[number].numpy().tobytes() for number in numbers] for column in content.columns.values()]
            arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def write_tar(folder: Path, content: Content) -> None:
    from webdataset import ShardWriter

    folder.mkdir()
    with ShardWriter(f"{folder}/%04d.tar", maxcount=ENTRIES_PER_SHARD, verbose=0) as writer:
        for number in range(SAMPLES):
            arrays = {f"{name}.npy": column[number].numpy() for name, column in content.columns.items()}
            writer.write({"__key__": f"{number:06}", **arrays})


# Ways to read


def read_entries(folder: Path, memory_bytes: int = 0) -> Lap:
    latents, texts = (ShardStore(folder / name, memory_bytes=memory_bytes) for name in ("latents", "texts"))

    def lap(order: list[int]) -> None:
        for number in order:
            latents.read(KEYS[number]), texts.read(KEYS[number])

    return lap


def read_batches(folder: Path, memory_bytes: int = 0) -> Lap:
    latents, texts = (ShardStore(folder / name, memory_bytes=memory_bytes) for name in ("latents", "texts"))

    def lap(order: list[int]) -> None:
        for start in range(0, len(order), BATCH):
            keys = [KEYS[number] for number in order[start : start + BATCH]]
            latents.read_batch(keys), texts.read_batch(keys)

    return lap


def read_npz(folder: Path) -> Lap:
    def lap(order: list[int]) -> None:
        for number in order:
            with np.load(folder / f"{number}.npz") as file:
                torch.from_numpy(file["latents"]), file["original_size"].tolist(), file["crop_ltrb"].tolist()
            with np.load(folder / f"{number}_te_outputs.npz") as file:
                [torch.from_numpy(file[name]) for name in ("hidden_state1", "hidden_state2", "pool2")]

    return lap


def read_pt(folder: Path) -> Lap:
    def lap(order: list[int]) -> None:
        for number in order:
            torch.load(folder / f"{number}.pt", weights_only=True), torch.load(folder / f"{number}_te.pt", weights_only=True)

    return lap


def read_arrow(folder: Path, content: Content) -> Lap:
    """Opened anew for each lap: what is mapped stays in memory when its file is dropped."""
    shapes = {name: column.shape[1:] for name, column in content.columns.items()}

    def lap(order: list[int]) -> None:
        file = pa.ipc.open_file(pa.memory_map(str(folder / "samples.arrow")))
        batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        for number in order:
            batch, row = batches[number // ENTRIES_PER_SHARD], number % ENTRIES_PER_SHARD
            for name, shape in shapes.items():
                torch.from_numpy(np.frombuffer(batch.column(name)[row].as_buffer(), np.float16).reshape(shape).copy())

    return lap


def read_tar(folder: Path) -> Lap:
    """From front to back, whatever the order."""
    from webdataset import WebDataset

    paths = [str(path) for path in sorted(folder.glob("*.tar"))]

    def lap(order: list[int]) -> None:
        count = 0
        for sample in WebDataset(paths, shardshuffle=False).decode():
            [torch.from_numpy(value) for name, value in sample.items() if name.endswith(".npy")]
            count += 1
        assert count == len(order)

    return lap


def read_bare(folder: Path, sample_bytes: int) -> Lap:
    descriptor = os.open(folder / "packed", os.O_RDONLY)

    def lap(order: list[int]) -> None:
        for number in order:
            tensor = torch.empty(sample_bytes, dtype=torch.uint8)
            assert os.preadv(descriptor, [tensor.numpy()], number * sample_bytes) == sample_bytes

    return lap


def read_bare_batches(folder: Path, sample_bytes: int) -> Lap:
    descriptor = os.open(folder / "packed", os.O_RDONLY)

    def lap(order: list[int]) -> None:
        for start in range(0, len(order), BATCH):
            numbers = order[start : start + BATCH]
            rows = torch.empty((len(numbers), sample_bytes), dtype=torch.uint8).numpy()
            for row, number in zip(rows, numbers, strict=True):
                assert os.preadv(descriptor, [row], number * sample_bytes) == sample_bytes

    return lap


# Measuring


def seconds_of(action: Callable[[], object]) -> Seconds:
    clock, processor = time.perf_counter(), time.process_time()
    action()
    return Seconds(time.perf_counter() - clock, time.process_time() - processor)


def in_turns(ways: dict[str, Callable[[], Seconds]], rounds: int) -> dict[str, list[Seconds]]:
    """The seconds that each way took in each round. The order changes from round to round; the first round does not count."""
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in random.sample(list(ways), len(ways)):
            took = ways[name]()
            if number:
                seconds[name].append(took)
    return seconds


def spread(values: list[float], digits: int) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [round(value, digits) if digits else round(value) for value in statistics.quantiles(values, n=4)]


def per_second(seconds: list[Seconds]) -> dict[str, list[float]]:
    """Samples in a second."""
    return {kind: spread([SAMPLES / getattr(one, kind) for one in seconds], 0) for kind in Seconds._fields}


def ratio(ours: list[Seconds], theirs: list[Seconds]) -> dict[str, list[float]]:
    """How many times as fast ours is, over the rounds."""
    pairs = list(zip(ours, theirs, strict=True))
    return {kind: spread([getattr(other, kind) / getattr(own, kind) for own, other in pairs], 2) for kind in Seconds._fields}


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_writes(folder: Path, content: Content) -> dict[str, list[Seconds]]:
    ways: dict[str, Callable[[Path], None]] = {
        "shards": lambda place: write_shards(place, content),
        "npz": lambda place: write_npz(place, content, torch.float32),
        "npz_float16": lambda place: write_npz(place, content, torch.float16),
        "pt": lambda place: write_pt(place, content),
        "bare": lambda place: write_bare(place, content),
        "arrow": lambda place: write_arrow(place, content),
        **({"tar": lambda place: write_tar(place, content)} if has("webdataset") else {}),
        "npz_safe": lambda place: write_npz(place, content, torch.float32, safe=True),
    }

    def timed(name: str, *, to_disk: bool) -> Callable[[], Seconds]:
        def once() -> Seconds:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()
            return seconds_of(lambda: (ways[name](folder / name), os.sync() if to_disk else None))

        return once

    turns = {name: timed(name, to_disk=False) for name in ways}
    return in_turns(turns | {f"{name}_on_disk": timed(name, to_disk=True) for name in ("npz", "pt", "bare")}, SLOW_ROUNDS)


def measure_reads(folder: Path, content: Content) -> tuple[dict[str, list[Seconds]], dict[str, list[Seconds]]]:
    """Seconds of warm and of cold laps."""
    everything = SAMPLES * content.sample_bytes
    ways: dict[str, tuple[str, Lap]] = {
        "shards_read": ("shards", read_entries(folder / "shards")),
        "shards_read_batch": ("shards", read_batches(folder / "shards")),
        "npz": ("npz", read_npz(folder / "npz")),
        "npz_float16": ("npz_float16", read_npz(folder / "npz_float16")),
        "pt": ("pt", read_pt(folder / "pt")),
        "bare_preadv": ("bare", read_bare(folder / "bare", content.sample_bytes)),
        "bare_preadv_batch": ("bare", read_bare_batches(folder / "bare", content.sample_bytes)),
        "arrow_mmap": ("arrow", read_arrow(folder / "arrow", content)),
        **({"tar_in_order": ("tar", read_tar(folder / "tar"))} if has("webdataset") else {}),
    }
    memory = {
        "shards_read_memory_full": ("shards", read_entries(folder / "shards", everything)),
        "shards_read_memory_half": ("shards", read_entries(folder / "shards", everything // 4)),  # of each of the two stores
        "shards_read_batch_memory_full": ("shards", read_batches(folder / "shards", everything)),
    }

    def timed(place: str, lap: Lap, *, cold: bool) -> Callable[[], Seconds]:
        def once() -> Seconds:
            if cold:
                forget(folder / place)
            order = random.sample(range(SAMPLES), SAMPLES)
            return seconds_of(lambda: lap(order))

        return once

    warm = in_turns({name: timed(*way, cold=False) for name, way in (ways | memory).items()}, ROUNDS)
    return warm, in_turns({name: timed(*way, cold=True) for name, way in ways.items()}, SLOW_ROUNDS)


def hit_shares(size: int = 2000, laps: int = 6) -> dict[str, float]:
    """How often an entry is in a memory that holds half of them, in laps of random orders: the last ones read, or the first ones."""
    dice, lru, kept = random.Random(0), dict.fromkeys(range(size // 2)), set(range(size // 2))
    hits = {"least_recently_used_leaves": 0, "first_come_stays": 0}
    for _ in range(laps):
        for number in dice.sample(range(size), size):
            hits["first_come_stays"] += number in kept
            hits["least_recently_used_leaves"] += number in lru
            lru.pop(number, None) if number in lru else lru.pop(next(iter(lru)))
            lru[number] = None
    return {name: round(count / laps / size, 3) for name, count in hits.items()}


def write_large_index(folder: Path) -> None:
    """An index of a million entries, and files that have the names and sizes of its shards and nothing else."""
    each, dice = INDEX_ENTRIES // INDEX_SHARDS, np.random.default_rng(0)
    layout = Layout(each, 4096, (Field("moments", "F16", (8, 128, 128)),), (200,))
    names = tuple(sorted(f"{dice.bytes(16).hex()}.safetensors" for _ in range(INDEX_SHARDS)))
    keys = np.sort(np.frombuffer(dice.bytes(16 * INDEX_ENTRIES), "S16")).view(np.uint8).reshape(-1, 16)
    places = dice.permutation(INDEX_ENTRIES).astype(np.int32)
    folder.mkdir()
    save_index(folder, ShardIndex(keys, keys, places // each, places % each, names, (layout,) * INDEX_SHARDS))
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(4096)


def open_index(folder: Path) -> dict[str, float]:
    """What opening costs in this process, which has done nothing else."""
    before, stores = resident_bytes(), []
    opening = seconds_of(lambda: stores.append(ShardStore(folder)))
    resident_mb = (resident_bytes() - before) / 1e6
    (store,) = stores
    assert len(store) == INDEX_ENTRIES
    asking = seconds_of(partial(store.has, np.random.default_rng(1).permutation(store.keys())))
    return {
        "open_clock": opening.clock, "open_processor": opening.processor, "resident_mb": resident_mb,
        "ask_for_a_million_clock": asking.clock, "ask_for_a_million_processor": asking.processor,
    }  # fmt: skip


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_opening(folder: Path) -> dict[str, float]:
    write_large_index(folder)
    rounds = [json.loads(subprocess.check_output([sys.executable, "-m", "benchmarks.cache_io", "--open", folder])) for _ in range(ROUNDS)]
    return {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}


def report(content: Content, sizes: dict[str, int], written: dict[str, list[Seconds]], warm: dict[str, list[Seconds]]) -> dict[str, object]:
    return {
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "xxhash": xxhash.VERSION,
            "pyarrow": pa.__version__, **({"webdataset": version("webdataset")} if has("webdataset") else {}), "linux": platform.release(),
        },
        "load": load(),
        "samples": SAMPLES, "bytes_per_sample": content.sample_bytes, "entries_per_shard": ENTRIES_PER_SHARD, "batch": BATCH,
        "rounds": {"read_warm": ROUNDS, "read_cold": SLOW_ROUNDS, "write": SLOW_ROUNDS}, "values": "lower quartile, median, upper quartile",
        "bytes_on_disk_per_sample": {name: round(size / SAMPLES) for name, size in sizes.items()},
        "write": {name: per_second(seconds) for name, seconds in written.items()},
        "read_warm": {name: per_second(seconds) for name, seconds in warm.items()},
        "times_as_fast": {
            **{f"{own}_to_{other}": ratio(warm[own], warm[other])
               for own in ("shards_read", "shards_read_batch")
               for other in warm if not other.startswith("shards")},
            **{f"write_to_{other}": ratio(written["shards"], written[other]) for other in written if other != "shards"},
        },
    }  # fmt: skip


def measure(folder: Path) -> dict[str, object]:
    content = Content()
    written = measure_writes(folder, content)
    sizes = {
        name: bytes_in(folder / name) for name in ("shards", "npz", "npz_float16", "pt", "bare", "arrow", "tar") if (folder / name).exists()
    }
    warm, cold = measure_reads(folder, content)
    return {
        **report(content, sizes, written, warm),
        "read_cold": {name: per_second(seconds) for name, seconds in cold.items()},
        "hits_with_memory_for_half": hit_shares(),
        "open_index_of_a_million": measure_opening(folder / "index"),
    }


def compact(result: dict[str, object]) -> str:
    """JSON with each list of numbers on one line."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), json.dumps(result, indent=2))


@contextlib.contextmanager
def scratch(parent: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=parent) as name:
        yield Path(name)


def main() -> None:
    if sys.argv[1:2] == ["--open"]:
        print(json.dumps(open_index(Path(sys.argv[2]))))
        return
    torch.set_num_threads(1)
    random.seed(0)
    with scratch(sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        result = measure(folder)
    text = compact(result)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cache_io_cpu_{datetime.now(UTC):%Y-%m-%d}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
