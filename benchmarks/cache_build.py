"""Does the encoder ever wait while a cache is built, and what do a million keys and jobs cost?

    python benchmarks/cache_build.py

A stub stands for the autoencoder: it sleeps 20 ms for each batch of 4, about what a large GPU needs. Printed is the share of
wall time that is spent inside it, the best and the median of 5 builds of 512 JPEGs, for several sizes and for shards of
different length. Above 0.85 at 768 x 768 on two cores that nobody else uses is the goal. Keys, plans and lookups are of a million views.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from aquatint.data import crop
from aquatint.data.cache import LatentRequest, build_latents, crop_rows, latent_keys, text_keys
from aquatint.data.image import load_image
from aquatint.data.jobs import missing, plan_jobs
from aquatint.data.places import Opener, Place
from aquatint.data.shards import ShardStore

PICTURES, BATCH_SIZE, ROUNDS, MILLION = 512, 4, 5, 1_000_000
RESULTS = Path(__file__).parent / "results"


class Stub:
    digest = "stub"

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.inside = seconds, 0.0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        time.sleep(self.seconds)
        latents = torch.zeros(len(images), 8, images.shape[2] // 8, images.shape[3] // 8)
        self.inside += time.perf_counter() - started
        return latents


def write_jpegs(folder: Path, side: int) -> list[Path]:
    """Pictures with the detail of photographs: about 200 kB at 768 x 768."""
    folder.mkdir()
    dice = np.random.default_rng(0)
    coarse = Image.fromarray(dice.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
    paths = [folder / f"{number}.jpg" for number in range(16)]
    for number, path in enumerate(paths):
        pixels = np.roll(smooth, 40 * number, axis=1) + dice.integers(-12, 13, (side, side, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def requests_for(paths: list[Path], side: int, target: int) -> list[LatentRequest]:
    digests = [hashlib.blake2b(path.read_bytes(), digest_size=16).digest() for path in paths]
    cut = crop.fit((side, side), (target, target))
    return [
        LatentRequest(number.to_bytes(16, "big"), Place(str(paths[number % 16])), digests[number % 16], cut) for number in range(PICTURES)
    ]


def measure(folder: Path, side: int, target: int, shard_entries: int) -> dict[str, object]:
    paths = write_jpegs(folder, side)
    requests = requests_for(paths, side, target)
    decoding = seconds_of(lambda: [load_image(BytesIO(path.read_bytes()), "#ffffff", 10**9) for path in paths]) / len(paths)
    shares, rates, cores = [], [], []
    for number in range(ROUNDS):
        stub, started, used = Stub(), time.perf_counter(), time.process_time()
        build_latents(
            ShardStore(folder / f"cache-{number}"), requests, lambda stub=stub: stub, opener=Opener(), alpha_color="#ffffff",
            max_pixels=10**9, dtype="float16", batch_size=BATCH_SIZE, shard_entries=shard_entries,
        )  # fmt: skip
        wall = time.perf_counter() - started
        shares.append(stub.inside / wall)
        rates.append(PICTURES / wall)
        cores.append((time.process_time() - used) / wall)
    return {
        "side": side, "target": target, "shard_entries": shard_entries, "jpeg_kB": round(paths[0].stat().st_size / 1000),
        "decode_ms": round(1000 * decoding, 1), "share_best": round(max(shares), 3), "share_median": round(statistics.median(shares), 3),
        "pictures_per_second": round(statistics.median(rates), 1), "cores_used": round(statistics.median(cores), 2),
    }  # fmt: skip


def measure_columns() -> dict[str, float]:
    """Seconds for a million views."""
    digests = np.random.default_rng(0).integers(0, 256, (MILLION, 16), dtype=np.uint8)
    rows = np.repeat(crop_rows([crop.fit((1200, 900), (1024, 768))]), MILLION, axis=0)
    keys = latent_keys(digests, rows, bytes(16))
    captions = [f"a picture of number {number}, in the morning" for number in range(MILLION)]
    raw, cut, place = keys.tobytes(), crop.fit((1200, 900), (1024, 768)), Place("a.jpg")
    requests = [LatentRequest(raw[16 * row : 16 * row + 16], place, b"", cut) for row in range(MILLION)]
    with tempfile.TemporaryDirectory() as name:
        store = ShardStore(Path(name))
        return {
            "latent_keys": round(seconds_of(lambda: latent_keys(digests, rows, bytes(16))), 2),
            "text_keys": round(seconds_of(lambda: text_keys(captions, bytes(16))), 2),
            "missing": round(seconds_of(lambda: missing(store, requests)), 2),
            "plan_jobs": round(seconds_of(lambda: plan_jobs(requests, 256)), 2),
        }


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        cases = ((512, 512, 64), (768, 768, 64), (768, 768, 256), (1024, 1024, 256), (1536, 768, 64))
        builds = [measure(Path(name) / f"{side}-{target}-{entries}", side, target, entries) for side, target, entries in cases]
    result = {
        "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(), "load_afterwards": os.getloadavg()[0],
        "pictures": PICTURES, "batch_size": BATCH_SIZE, "encoder_ms": 20, "builds": builds, "seconds_per_million": measure_columns(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"cache_build_cpu_{datetime.now(UTC):%Y-%m-%d}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
