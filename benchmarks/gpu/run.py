"""Which rows of the GPU's plan fit into one call of ten minutes, and what do they say?

    PYTHONPATH=src python3 -m benchmarks.gpu.run peers|ours|graphs|operations|optimizers|vae [--rows 3,4] [--dry]

starts every contender of a call in a process of its own, the first one again at the end to see whether the machine stayed the same, and
adds what each says to results/gpu_<row>_<gpu>_<date>.json as soon as it is there. What fails or is not installed says so, and what does
not fit into the time is named at the end; --rows takes it up in another call. Exits with 1 if anything failed. Needs torch,
transformers, triton and diffusers, and nothing of aquatint's other dependencies (so the trainer's loop is not there, but its steps are
launched in the same way); accelerate and peft for the peers that use them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aquatint.storage import write_text
from benchmarks.gpu import full_tune, lora, operations, optimizers, vae_encode
from benchmarks.gpu.rig import Scene
from benchmarks.machine import RESULTS, compact, versions

BUDGET_SECONDS, LEAST_SECONDS, LIMIT_SECONDS = 570.0, 40.0, 240.0
ALLOCATOR = "expandable_segments:True"  # for all alike: otherwise a batch that fits may not, for want of a piece that is large enough
TRAINING = (full_tune, lora)
CALLS = ("peers", "ours", "graphs", "operations", "optimizers", "vae")


@dataclass(frozen=True)
class Piece:
    """One process: a script of this folder, what it is told, and the row of its result."""

    script: str
    row: str
    contender: str
    what: str = ""

    def command(self, *, dry: bool) -> list[str]:
        words = [sys.executable, "-m", f"benchmarks.gpu.{self.script}", "--contender", self.contender]
        words += ["--row", self.row.removeprefix("row")] if self.row.startswith("row") else []
        return [*words, "--dry"] if dry else words


def kind_of(contender: str) -> str:
    """The call that a contender of the training rows belongs to."""
    if not contender.startswith("ours"):
        return "peers"
    return "graphs" if "CUDA graph" in contender else "ours"


def pieces(call: str, rows: Sequence[int] = ()) -> list[Piece]:
    """What a call measures, in order; `rows` leaves out the others."""
    if call == "optimizers":
        return [Piece("optimizers", "optimizers", name, "one step of an optimizer") for name in (*optimizers.CONTENDERS, "factorisations")]
    if call == "operations":
        return [Piece("operations", "operations", name, "single operations of the UNet") for name in operations.CONTENDERS]
    groups = (vae_encode,) if call == "vae" else TRAINING
    return [
        Piece(group.__name__.rpartition(".")[2], f"row{row.number}", contender, row.what)
        for group in groups
        for row in group.ROWS.values()
        for contender in row.contenders
        if (call == "vae" or kind_of(contender) == call) and (not rows or row.number in rows)
    ]


def run(piece: Piece, seconds: float, *, dry: bool) -> dict[str, Any]:
    """What the process says, or why it says nothing."""
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": ALLOCATOR}
    started = time.perf_counter()
    try:
        done = subprocess.run(piece.command(dry=dry), capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {seconds:.0f} seconds"}
    found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not found:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"left_out" if last[0].endswith("is not installed") else "failed": last[0][-300:]}
    return {**json.loads(found[-1]), "process_seconds": round(time.perf_counter() - started, 1)}


def in_time(chosen: Sequence[Piece], left: list[Piece], *, repeats: bool) -> Iterator[tuple[Piece, float]]:
    """Each piece with the seconds it may take; those that come too late go to `left`. The first comes again at the end if it `repeats`."""
    began, reserve = time.perf_counter(), 0.0

    def remaining() -> float:
        return BUDGET_SECONDS - (time.perf_counter() - began)

    for index, piece in enumerate(chosen):
        if remaining() - reserve < LEAST_SECONDS:
            left.append(piece)
            continue
        yield piece, min(remaining() - reserve, LIMIT_SECONDS)
        if index == 0 and repeats:
            reserve = BUDGET_SECONDS - remaining()
    if repeats:
        yield chosen[0], max(remaining(), LEAST_SECONDS)


def gpu_name() -> str:
    """As part of a file's name. Asked in another process: this one must not take memory of the GPU."""
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    name = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    return re.sub(r"[^a-z0-9]+", "_", name.strip().lower())


def add(piece: Piece, found: dict[str, Any], call: str, gpu: str, folder: Path) -> None:
    """Adds one measurement to today's file of its row."""
    now = datetime.now(UTC)
    path = folder / f"gpu_{piece.row}_{gpu}_{now:%Y-%m-%d}.json"
    result: dict[str, Any] = {"what": piece.what, "gpu": gpu, "allocator": ALLOCATOR}
    if path.exists():
        result = json.loads(path.read_text())
    result.setdefault("measured", {}).setdefault(piece.contender, []).append(
        {"call": call, "at": f"{now:%H:%M:%S}", "versions": versions(), **found}
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, compact(result) + "\n")


def line_of(piece: Piece, found: dict[str, Any]) -> str:
    if "pictures_per_second" in found:
        said = f"{found['pictures_per_second']:8.2f} pictures/s {100 * found['mfu_of_989']:5.1f} % MFU, batch {found['batch_size']}"
    elif "ms_per_step" in found:
        said = f"{found['ms_per_step'][1]:8.2f} ms"
    else:
        said = found.get("failed") or found.get("left_out") or json.dumps(found.get("ms"))
    return f"{piece.row:<11} {piece.contender:<36} {said}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--rows", type=lambda text: [int(number) for number in text.split(",")], default=[])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU, and no results")
    chosen = parser.parse_args(arguments)
    planned = pieces(chosen.call, chosen.rows)
    Scene.of(dry=chosen.dry)  # ends here without a GPU
    gpu = "" if chosen.dry else gpu_name()
    left: list[Piece] = []
    failed: list[Piece] = []
    if not planned:
        parser.error(f"{chosen.call} has none of these rows")
    for piece, seconds in in_time(planned, left, repeats=len(planned) > 1 and not chosen.dry):
        found = run(piece, seconds, dry=chosen.dry)
        print(line_of(piece, found), flush=True)
        if "failed" in found:
            failed.append(piece)
        if not chosen.dry:
            add(piece, found, chosen.call, gpu, chosen.results)
    for piece in left:
        print(f"{piece.row:<11} {piece.contender:<36} no time left for it", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
