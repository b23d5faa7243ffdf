"""How long a run over a million pictures takes to begin, and how much memory: `python benchmarks/million_rows.py FOLDER [ROWS]`.

First a table of pictures (names, sizes, digests, captions) is written, and a cache whose indexes say that all of them are
encoded; only the entries of the first batches really are. Then a fresh process opens the table, splits, plans buckets, decides
crops and captions, computes two keys per picture, opens the indexes, looks up all keys, and reads the first batches.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from aquatint.config.schema import Config
from aquatint.data.loader import BatchReader, Draws, Entries
from aquatint.data.manifest import Manifest
from aquatint.data.sampler import Order
from aquatint.data.shard_index import Field, Layout, ShardIndex, save_index
from aquatint.data.shards import ShardStore
from aquatint.data.sources.listing import Source
from aquatint.training.layout import lay_out, recipes_of

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS, LIMIT_BYTES = 20.0, 1.5e9
BATCHES, BATCH_SIZE, PER_SHARD, ROUNDS = 50, 8, 256, 5


def config() -> Config:
    sections = {"training": {"batch_size": BATCH_SIZE}, "validation": {"max_pictures": 64}}
    return Config.model_validate({"model": {"base": "none"}, "data": {"sources": [{"path": "none"}]}, **sections})


def open_and_lay_out(folder: Path):
    with pa.memory_map(str(folder / "manifest.arrow")) as file:
        manifest = Manifest(pa.ipc.open_file(file).read_all(), (Source("none"),))
    return lay_out(config(), manifest, recipes_of(config(), {"vae": "", "text_encoders": ""}))


def order_of(layout) -> Order:
    return Order(0, layout.groups, BATCH_SIZE)


def prepare(folder: Path, rows: int) -> None:
    """Writes the table, the indexes, and the entries of the first batches."""
    sys.path.insert(0, str(ROOT))
    from tests.data.synthetic import manifest

    folder.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(folder / "manifest.arrow"), "wb") as file, pa.ipc.new_file(file, (table := manifest(rows).table).schema) as writer:
        writer.write_table(table)
    layout = open_and_lay_out(folder)
    samples, order = layout.train.samples, order_of(layout)
    prompts = np.frombuffer(b"".join(layout.prompts.values()), np.uint8).reshape(-1, 16)
    write_index(folder / "latents", np.concatenate([side.samples.latent_keys.reshape(-1, 16) for side in (layout.train, layout.held_out)]))
    write_index(folder / "texts", np.concatenate([prompts, samples.text_keys, layout.held_out.samples.text_keys]))
    latents, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    empty = {"prompt_embeds": torch.zeros(77, 8).half(), "pooled": torch.zeros(4).half()}
    captions, pictures = {layout.prompts[""]: empty}, {}
    for index in range(BATCHES):
        bucket, members = order.batch(index)
        for row in (samples.bucket(bucket).start + member for member in members):
            shape = (8, *(samples.time_ids[row, 0, 4:] // 8).tolist())
            pictures.setdefault(shape, {})[samples.latent_key(row, 0)] = {"moments": torch.zeros(shape).half()}
            captions[samples.text_key(samples.text_of[row][0])] = empty
    for entries in pictures.values():
        latents.write(entries)
    texts.write(captions)
    for store in (latents, texts):
        store.save_index()


def write_index(folder: Path, keys: np.ndarray) -> None:
    """An index that has these keys, and files that have the names and sizes of its shards and nothing else.

    The names come last, so that an entry that is really there is the one that is read.
    """
    folder.mkdir(parents=True)
    keys = np.sort(np.unique(np.ascontiguousarray(keys).view("S16").reshape(-1))).view(np.uint8).reshape(-1, 16)
    count = -(-len(keys) // PER_SHARD)
    names = tuple(f"{'f' * 24}{number:08x}.safetensors" for number in range(count))
    layout = Layout(PER_SHARD, 4096, (Field("moments", "F16", (8, 128, 128)),), (200,))
    places = np.arange(len(keys), dtype=np.int32)
    save_index(folder, ShardIndex(keys, keys, places // PER_SHARD, places % PER_SHARD, names, (layout,) * count))
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(4096)


def begin(folder: Path, started: float) -> dict[str, float]:
    """From nothing to batches."""
    marks = {"imports": time.perf_counter() - started}
    layout = open_and_lay_out(folder)
    marks["laid out"] = time.perf_counter() - started
    latents, texts = ShardStore(folder / "latents"), ShardStore(folder / "texts")
    marks["indexes open"] = time.perf_counter() - started
    samples = layout.train.samples
    assert latents.has(samples.latent_keys.reshape(-1, 16)).all()
    assert texts.has(samples.text_keys).all()
    marks["all looked up"] = time.perf_counter() - started
    reader = BatchReader(Entries(latents, texts, None, 0.13025, layout.prompts[""]), samples, order_of(layout), Draws(0, BATCH_SIZE))
    reader.read(0)
    marks["first batch"] = time.perf_counter() - started
    names = {name for index in range(BATCHES) for name in reader.read(index).names}
    marks[f"{BATCHES} batches"] = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rounded = {name: round(value, 3) for name, value in marks.items()}
    return {**rounded, "pictures seen": len(names), "buckets": len(layout.groups), "peak_bytes": peak}


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    call = [sys.executable, __file__, str(folder), str(rows)]
    subprocess.run([*call, "prepare"], check=True)
    runs = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        output = subprocess.run([*call, "begin"], capture_output=True, text=True, check=True).stdout
        runs.append({**json.loads(output.splitlines()[-1]), "whole process": round(time.perf_counter() - started, 3)})
        print(runs[-1], flush=True)
    median = float(np.median([run["whole process"] for run in runs]))
    peak = max(run["peak_bytes"] for run in runs)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "pyarrow": pa.__version__}
    result = {
        "rows": rows, "runs": runs, "median_seconds": median, "peak_bytes": peak, "versions": versions,
        "limits": {"seconds": LIMIT_SECONDS, "bytes": LIMIT_BYTES}, "met": median < LIMIT_SECONDS and peak < LIMIT_BYTES,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "results" / f"million_rows_cpu_{time.strftime('%Y-%m-%d')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{rows:,} rows: median {median:.1f} s of {LIMIT_SECONDS:.0f}, peak {peak / 1e9:.2f} GB of {LIMIT_BYTES / 1e9:.1f}; wrote {path}")


if __name__ == "__main__":
    if sys.argv[3:] == ["prepare"]:
        prepare(Path(sys.argv[1]), int(sys.argv[2]))
    elif sys.argv[3:] == ["begin"]:
        print(json.dumps(begin(Path(sys.argv[1]), time.perf_counter())))
    else:
        main()
