"""How many steps a second does our loop make on a CPU, next to that of diffusers' SDXL training script?

    python -m benchmarks.step_speed

trains the demo's tiny UNet in float32, latents 16x16, with one and with two threads, with batches of 1 and of 4: in our loop, in the
script's with and without accelerate, and in the script's with what it does not choose by itself: the fused AdamW, and memory that is kept
when it is freed (see `peers`). Each has a process of its own, since memory is kept by a process as a whole. All of
them take turns of a few steps, in a new order each round, so that what else runs on the machine meets all alike. Of each: milliseconds
per step by the clock and by the processor; how many times as fast ours is, round by round. Values are lower quartile, median and upper
quartile. Goal: 1.15 times the script. A tiny UNet on a CPU says nothing about a GPU. On a busy machine set OMP_WAIT_POLICY=passive:
otherwise two threads spend most of their time waiting for each other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from aquatint.data.batch import Batch
from aquatint.optim.create import create_optimizer
from aquatint.training.parallelize import keep_freed_memory
from benchmarks.machine import has, keep, load, spread, versions
from benchmarks.ours import Loop, draw_batches, our_loop, our_parts, our_unet, repeated, tiny_unet
from benchmarks.peers import script, script_loop, script_loop_accelerate

ROUNDS, STEPS, THREADS, BATCH_SIZES, SIDE_LATENT = 9, 2, (1, 2), (1, 4), 16
LOOPS = ("ours", "script", "script, fused AdamW", "script, fused AdamW, memory kept", "script with accelerate")
GOAL = 1.15


class Seconds(NamedTuple):
    clock: float
    processor: float


def build(name: str) -> Loop:
    """One of `LOOPS`."""
    if name == "ours":
        unet = our_unet()
        optimizer: Any = create_optimizer("adamw", unet.named_parameters(), seed=0, learning_rate=1e-5, weight_decay=0.01)
        return our_loop(our_parts(unet, optimizer))
    unet = tiny_unet()
    made = script(unet, torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True if "fused" in name else None))
    if "memory kept" in name:
        keep_freed_memory()
    return script_loop_accelerate(made) if "accelerate" in name else script_loop(made)


def turn(loop: Loop, batches: Iterator[Batch], steps: int) -> Seconds:
    """Per step; every loss is read before the clock stops."""
    clock, processor = time.perf_counter(), time.process_time()
    for loss in loop(batches, steps):
        float(loss)
    return Seconds((time.perf_counter() - clock) / steps, (time.process_time() - processor) / steps)


def take_turns(name: str, threads: int, batch_size: int, asked: Connection) -> None:
    """In a process: as many steps as are asked for, until that is none."""
    torch.set_num_threads(threads)
    loop = build(name)
    batches = repeated(draw_batches(dict(tiny_unet().config), 4, batch_size, SIDE_LATENT))
    while steps := asked.recv():
        asked.send(turn(loop, batches, steps))


def measure(threads: int, batch_size: int, rounds: int, steps: int) -> dict[str, list[Seconds]]:
    """Seconds per step of each turn. A first round does not count."""
    chosen = [name for name in LOOPS if "accelerate" not in name or has("accelerate")]
    ends = {name: multiprocessing.Pipe() for name in chosen}
    spawned = multiprocessing.get_context("spawn")
    for name, (_, far) in ends.items():
        spawned.Process(target=take_turns, args=(name, threads, batch_size, far), daemon=True).start()
        far.close()
    seconds: dict[str, list[Seconds]] = {name: [] for name in chosen}
    for number in range(rounds + 1):
        for name in random.sample(chosen, len(chosen)):
            ends[name][0].send(steps)
            took = ends[name][0].recv()
            if number:
                seconds[name].append(took)
    for near, _ in ends.values():
        near.send(0)
    return seconds


def report(seconds: dict[str, list[Seconds]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, taken in seconds.items():
        found[name] = {f"ms_per_step_{kind}": spread([1000 * getattr(one, kind) for one in taken], 1) for kind in Seconds._fields}
        found[name]["steps_per_second"] = round(1 / found[name]["ms_per_step_clock"][1] * 1000, 3)
    for name in [name for name in seconds if name != "ours"]:
        pairs = list(zip(seconds["ours"], seconds[name], strict=True))
        found[f"times as fast as {name}"] = {
            kind: spread([getattr(other, kind) / getattr(own, kind) for own, other in pairs], 3) for kind in Seconds._fields
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    random.seed(0)
    before, found = load(), {}
    for threads in THREADS:
        for batch_size in BATCH_SIZES:
            setting = f"{threads} thread{'s' * (threads > 1)}, batch {batch_size}"
            found[setting] = report(measure(threads, batch_size, rounds, STEPS))
            print(setting, found[setting]["times as fast as script"], flush=True)
    ratios = {setting: one["times as fast as script"]["clock"][1] for setting, one in found.items()}
    result = {
        "versions": versions(), "load": {"before": before, "after": load()}, "rounds": rounds, "steps_per_turn": STEPS,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"), "latents": SIDE_LATENT,
        "weights": sum(p.numel() for p in tiny_unet().parameters()),
        "values": "lower quartile, median, upper quartile", "found": found,
        "goal": {"times as fast as script": GOAL, "met": {setting: ratio >= GOAL for setting, ratio in ratios.items()}},
    }  # fmt: skip
    keep("step_speed_cpu", result)


if __name__ == "__main__":
    main()
