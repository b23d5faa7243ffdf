"""How many steps a second does our loop make on a CPU, next to that of diffusers' SDXL training script?

    python -m benchmarks.step_speed

trains the demo's tiny UNet in float32, latents 16x16, with one and with two threads, with batches of 1 and of 4: in our loop, in the
script's with and without accelerate, and in the script's with the fused AdamW that it does not choose by itself (see `peers`). All of
them take turns of a few steps, in a new order each round, so that what else runs on the machine meets all alike. Of each: milliseconds
per step by the clock and by the processor; how many times as fast ours is, round by round. Values are lower quartile, median and upper
quartile. Goal: 1.15 times the script. A tiny UNet on a CPU says nothing about a GPU. On a busy machine set OMP_WAIT_POLICY=passive:
otherwise two threads spend most of their time waiting for each other.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from aquatint.data.batch import Batch
from aquatint.optim.create import create_optimizer
from benchmarks.machine import has, keep, load, spread, versions
from benchmarks.ours import Loop, draw_batches, our_loop, our_parts, repeated, tiny_unet
from benchmarks.peers import script, script_loop, script_loop_accelerate

ROUNDS, STEPS, THREADS, BATCH_SIZES, SIDE_LATENT = 9, 2, (1, 2), (1, 4), 16
GOAL = 1.15


class Seconds(NamedTuple):
    clock: float
    processor: float


def loops() -> dict[str, Loop]:
    """Each with a UNet and an optimizer of its own."""
    unet = tiny_unet()
    optimizer: Any = create_optimizer("adamw", unet.named_parameters(), seed=0, learning_rate=1e-5, weight_decay=0.01)
    found = {"ours": our_loop(our_parts(unet, optimizer))}
    unet = tiny_unet()
    found["script"] = script_loop(script(unet, torch.optim.AdamW(unet.parameters(), lr=1e-5)))
    unet = tiny_unet()
    found["script, fused AdamW"] = script_loop(script(unet, torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)))
    if has("accelerate"):
        unet = tiny_unet()
        found["script with accelerate"] = script_loop_accelerate(script(unet, torch.optim.AdamW(unet.parameters(), lr=1e-5)))
    return found


def turn(loop: Loop, batches: Iterator[Batch], steps: int) -> Seconds:
    """Per step; every loss is read before the clock stops."""
    clock, processor = time.perf_counter(), time.process_time()
    for loss in loop(batches, steps):
        float(loss)
    return Seconds((time.perf_counter() - clock) / steps, (time.process_time() - processor) / steps)


def measure(batch_size: int, rounds: int, steps: int) -> dict[str, list[Seconds]]:
    """Seconds per step of each turn. A first round does not count."""
    chosen = loops()
    batches = draw_batches(dict(tiny_unet().config), 4, batch_size, SIDE_LATENT)
    seconds: dict[str, list[Seconds]] = {name: [] for name in chosen}
    for number in range(rounds + 1):
        for name in random.sample(list(chosen), len(chosen)):
            took = turn(chosen[name], repeated(batches), steps)
            if number:
                seconds[name].append(took)
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
        torch.set_num_threads(threads)
        for batch_size in BATCH_SIZES:
            setting = f"{threads} thread{'s' * (threads > 1)}, batch {batch_size}"
            found[setting] = report(measure(batch_size, rounds, STEPS))
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
