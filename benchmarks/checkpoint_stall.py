"""How long does training stand still for a checkpoint of a gigabyte: written before it goes on, or meanwhile?

    python benchmarks/checkpoint_stall.py [--device cuda] [--folder FOLDER]

saves the weights, AdamW's moments and an average, 1 GB in float32, both ways in turns. The stall of a save that is written meanwhile is the
copy, told apart, and all the rest; that rest is to be below 5 % of the stall of a save that is waited for. While it is written, steps go
on (products of matrices, on one thread), and are compared with steps in peace. At the end the files of both ways are compared, byte by
byte.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from aquatint.training.checkpoint import Trained
from aquatint.training.ema import Ema
from aquatint.training.main_memory import Copy, Tables
from aquatint.training.saver import Saver
from aquatint.training.state import TrainState

ROUNDS, LAYERS, SIDE, GOAL = 7, 40, 1250, 0.05
RESULTS = Path(__file__).parent / "results"


class TimedCopy(Copy):
    """Knows how long its last copy took."""

    seconds = 0.0

    def take(self, tables: Tables) -> None:
        started = time.perf_counter()
        super().take(tables)
        self.seconds = time.perf_counter() - started


class Silence:
    """A display that has nothing to show."""

    def update(self, step: int, **figures: float) -> None:
        pass

    def note(self, text: str) -> None:
        raise RuntimeError(text)  # a save that failed, or was not written meanwhile: there is nothing to measure


def trained_on(device: torch.device) -> Trained:
    """62.5 million weights with AdamW's state and an average: 16 bytes each."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return Trained(model, optimizer, Ema(dict(model.named_parameters()), decay=0.999, warmup=False, device=None))


def one_step(left: torch.Tensor, right: torch.Tensor) -> float:
    """Seconds of some work such as training does."""
    started = time.perf_counter()
    for _ in range(4):
        torch.mm(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - started


def measure(parts: Trained, folder: Path, device: torch.device) -> dict[str, list[float]]:
    """Seconds of everything, each list in the order of the rounds."""
    waiting = Saver(folder / "waiting", parts, "plan", 1, Silence())
    meanwhile = Saver(folder / "meanwhile", parts, "plan", 1, Silence(), memory_share=1.0, copy=TimedCopy())
    left, right = (torch.randn(1024, 1024, device=device) for _ in range(2))
    found: dict[str, list[float]] = {name: [] for name in ("waiting", "copy", "rest", "write", "step_in_peace", "step_meanwhile")}
    for step in range(1, ROUNDS + 2):
        state = TrainState(step=step)
        started = time.perf_counter()
        waiting(state, None)  # type: ignore[arg-type]
        found["waiting"].append(time.perf_counter() - started)
        found["step_in_peace"] += [one_step(left, right) for _ in range(20)]
        started = time.perf_counter()
        meanwhile(state, None)  # type: ignore[arg-type]
        stall = time.perf_counter() - started
        assert isinstance(meanwhile.copy, TimedCopy)
        found["copy"].append(meanwhile.copy.seconds)
        found["rest"].append(stall - meanwhile.copy.seconds)
        while meanwhile.writing is not None:
            found["step_meanwhile"].append(one_step(left, right))
            meanwhile.look()
        found["write"].append(time.perf_counter() - started)
    last = f"step-{ROUNDS + 1:06}"
    for path in (folder / "waiting" / last).iterdir():
        assert path.read_bytes() == (folder / "meanwhile" / last / path.name).read_bytes(), path
    return found


def row(seconds: list[float]) -> dict[str, Any]:
    low, middle, high = (round(1000 * value, 2) for value in statistics.quantiles(seconds, n=4))
    return {"median_ms": middle, "quartiles_ms": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    parts = trained_on(device)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = measure(parts, Path(name), device)
    warm = {name: seconds[1:] if len(seconds) == ROUNDS + 1 else seconds for name, seconds in found.items()}
    share = statistics.median(warm["rest"]) / statistics.median(warm["waiting"])
    slower = statistics.median(warm["step_meanwhile"]) / statistics.median(warm["step_in_peace"])
    result = {
        "machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__, "device": arguments.device,
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2), "rounds": ROUNDS,
        "bytes": sum(tensor.nbytes for table in parts.tables().values() for tensor in table.values()),
        "first_copy_ms": round(1000 * (found["copy"][0] + found["rest"][0]), 1),
        "stall": {name: row(warm[name]) for name in ("waiting", "copy", "rest")}, "written_after": row(warm["write"]),
        "rest_of_waiting": round(share, 4), "goal": GOAL, "goal_reached": share < GOAL,
        "copy_of_waiting": round(statistics.median(warm["copy"]) / statistics.median(warm["waiting"]), 4),
        "steps_meanwhile_take": round(slower, 3), "files_equal": True,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"checkpoint_stall_{device.type}_{datetime.now(UTC):%Y-%m-%d}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
