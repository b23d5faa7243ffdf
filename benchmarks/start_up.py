"""How long from the command to the first step, and is the memory that `aquatint plan` foretells what a run takes?

    python -m benchmarks.start_up [--only time]

The first part starts the demo's run (576 pictures, a tiny model) in processes of their own, with nothing encoded and then again with
everything there, and splits what passes until the second step would begin: imports; scan (pictures and captions); plan (buckets, crops,
captions); encode; load (UNet, optimizer, average); before (the rest, such as the digest of the base and the announcement); looks (loss on
held-out pictures and the first sample pictures); first step. The second trains two steps of a UNet of 261 million weights on the CPU, three
ways, and compares the largest resident memory of each process with its plan.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import keep, load, spread, versions

ROUNDS = 3
PHASES = ("imports", "scan", "plan", "encode", "load", "before", "looks", "first step")
MEMORY_CASES: dict[str, dict[str, Any]] = {
    "AdamW, fp32, average": {"optimizer": {"name": "adamw"}, "training": {"precision": "fp32"}, "ema": {"enabled": True}},
    "Adafactor in the backward pass, bf16": {
        "optimizer": {"name": "adafactor"}, "training": {"precision": "bf16_pure", "fused_backward": True, "clip": "delayed"},
    },
    "Adafactor, bf16_mixed, nothing computed again, batch of 2": {
        "optimizer": {"name": "adafactor"}, "training": {"precision": "bf16_mixed", "gradient_checkpointing": False, "batch_size": 2},
    },
}  # fmt: skip


class Done(BaseException):
    """The first step is over."""


class Phases:
    """Seconds by phase, on the clock and of this process. A phase inside another one is not counted in that one."""

    def __init__(self, started: float) -> None:
        self.seconds: dict[str, list[float]] = {name: [0.0, 0.0] for name in PHASES}
        self.name, self.since = "imports", (started, 0.0)

    def turn(self, name: str) -> str:
        """Ends one phase, begins another, and returns the name of the one that ended."""
        now = time.perf_counter(), time.process_time()
        for kind in range(2):
            self.seconds[self.name][kind] += now[kind] - self.since[kind]
        ended, self.name, self.since = self.name, name, now
        return ended

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            outside = self.turn(name)
            try:
                return function(*arguments, **settings)
            finally:
                self.turn(outside)

        return call


def start(config: Path, started: float) -> dict[str, list[float]]:
    """Goes to the end of the first step, in this process."""
    phases = Phases(started)
    from aquatint.config.load import load_config
    from aquatint.training import build, prepare, trainer

    phases.turn("before")
    for module, name, phase in (
        (prepare, "find_pictures", "scan"), (prepare, "lay_out", "plan"), (prepare._Build, "all", "encode"), (build, "build_parts", "load"),
    ):  # fmt: skip
        setattr(module, name, phases.timed(phase, getattr(module, name)))
    real, steps = trainer.train_step, Counter[str]()

    def train_step(*arguments: Any) -> Any:
        steps["begun"] += 1
        if steps["begun"] == 2:
            raise Done
        phases.turn("first step")
        return real(*arguments)

    def audit(*arguments: Any) -> Any:
        """What is made right after the looks."""
        phases.turn("before")
        return real_audit(*arguments)

    def tasks(*arguments: Any) -> Any:
        """What is made right before the looks."""
        made = real_tasks(*arguments)
        phases.turn("looks")
        return made

    real_audit, build.Audit = build.Audit, audit  # type: ignore[misc]
    real_tasks, build.build_tasks = build.build_tasks, tasks
    trainer.train_step = train_step
    try:
        build.train_run(load_config(config, []))
    except Done:
        phases.turn("first step")
    return phases.seconds


def start_of_a_process(config: Path) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.start_up", "--child", str(config), "--started", repr(time.perf_counter())]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found: dict[str, list[float]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def write_demo(folder: Path) -> Path:
    from importlib.resources import files

    from aquatint.demo.run import write_inputs

    return write_inputs(folder, (files("aquatint.demo") / "assets" / "run.toml").read_text())


def measure_time(rounds: int = ROUNDS) -> dict[str, Any]:
    kinds: dict[str, list[dict[str, list[float]]]] = {"nothing encoded": [], "again": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            config = write_demo(Path(name))
            for found in kinds.values():
                found.append(start_of_a_process(config))
    return {kind: {"clock": table(found, 0), "processor": table(found, 1)} for kind, found in kinds.items()}


def table(found: list[dict[str, list[float]]], kind: int) -> dict[str, list[float]]:
    phases = {name: spread([one[name][kind] for one in found], 2) for name in PHASES}
    return phases | {"all": spread([sum(seconds[kind] for seconds in one.values()) for one in found], 2)}


# Memory


def middle_spec() -> Any:
    """A UNet of 261 million weights, so that they and not the program take most of the memory."""
    from tests.planning.test_process_memory import middle_spec

    return middle_spec()


def write_middle(folder: Path) -> None:
    from aquatint.demo.model import random_tensors
    from aquatint.demo.pictures import write_pictures
    from aquatint.models.sdxl.export import write_single_file
    from aquatint.models.sdxl.process import Process
    from aquatint.models.sdxl.shapes import COMPONENTS

    spec = middle_spec()
    write_single_file(folder / "base.safetensors", spec, {c: random_tensors(c, spec, 0) for c in COMPONENTS}, process=Process())
    write_pictures(folder / "pictures", count=2, seed=0)


def memory_config(folder: Path, name: str) -> Any:
    from aquatint.config.schema import Config

    case = MEMORY_CASES[name]
    return Config.model_validate({
        "run": {"name": "measured", "folder": folder / f"runs-{list(MEMORY_CASES).index(name)}"},
        "model": {"base": folder / "base.safetensors"},
        "data": {"sources": [{"path": str(folder / "pictures")}], "max_uncaptioned_share": 1.0},
        "buckets": {"resolution": 256, "min_side": 128, "max_side": 512},
        "cache": {"folder": folder / "cache", "batch_size": 1},
        "loader": {"workers": 0},
        "optimizer": {"learning_rate": 1e-5, **case["optimizer"]},
        "training": {"length": "2 steps", "device": "cpu", **case["training"]},
        "ema": {"enabled": False, **case.get("ema", {})},
        "validation": {"every": None, "share": 0.0},
        "samples": {"every": None},
        "export": {"dtype": "bfloat16"},
        "tracking": {"log_every": "1 step"},
    })  # fmt: skip


def peak_of(config: Path) -> int:
    """Trains in this process and returns the largest resident memory it had, in bytes."""
    from aquatint.config.schema import Config
    from aquatint.training.build import train_run

    train_run(Config.model_validate(json.loads(config.read_text())))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_memory() -> dict[str, Any]:
    from aquatint.config.schema import dump
    from aquatint.planning.memory import plan_memory

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_middle(folder)
        for case in MEMORY_CASES:
            config = memory_config(folder, case)
            (folder / "run.json").write_text(json.dumps(dump(config)))
            command = [sys.executable, "-m", "benchmarks.start_up", "--peak", str(folder / "run.json")]
            settings = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # which training sets itself for larger models
            ended = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | settings)
            planned, measured = plan_memory(config, middle_spec()).needed, int(ended.stdout.splitlines()[-1])
            found[case] = {
                "planned_gib": round(planned / 2**30, 2), "measured_gib": round(measured / 2**30, 2), "ratio": round(planned / measured, 3),
            }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["time", "memory"])
    parser.add_argument("--child", type=Path)
    parser.add_argument("--started", type=float)
    parser.add_argument("--peak", type=Path)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(start(chosen.child, chosen.started)))
    elif chosen.peak:
        print(peak_of(chosen.peak))
    else:
        before, parts = load(), {"time": measure_time, "memory": measure_memory}
        found = {name: measure() for name, measure in parts.items() if chosen.only in (None, name)}
        keep("start_up_cpu", {
            "versions": versions(), "rounds": ROUNDS, "values": "seconds: lower quartile, median, upper quartile",
            "load": {"before": before, "after": load()}, **found,
        })  # fmt: skip


if __name__ == "__main__":
    main()
