"""What does the framework cost on top of forward, backward and step?

    python benchmarks/loop_overhead.py

trains the demo's tiny model twice, in turns: in our loop (batches read from the cache by the loader, checks, moving
average off, metrics written) and in a bare loop over the same batches, held in memory. Prints the median ratio of step
times and its spread. Below 1.05 is the goal.
"""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from aquatint.config.schema import Config
from aquatint.demo.model import write_tiny_base
from aquatint.demo.pictures import write_pictures
from aquatint.diffusion.loss import per_sample_mse
from aquatint.diffusion.parameterization import target
from aquatint.diffusion.schedule import add_noise
from aquatint.models.sdxl.model import predict
from aquatint.training.build import build_run
from aquatint.training.state import TrainState
from aquatint.training.trainer import Run, graceful_stop, train

STEPS, ROUNDS, BATCH_SIZE = 8, 9, 8
RESULTS = Path(__file__).parent / "results"


def config(folder: Path) -> Config:
    return Config.model_validate({
        "run": {"folder": folder / "runs"},
        "model": {"base": folder / "base.safetensors"},
        "data": {"sources": [{"folder": folder / "pictures"}]},
        "buckets": {"resolution": 128, "min_side": 64, "max_side": 256},
        "cache": {"folder": folder / "cache"},
        "loader": {"workers": 0},
        "training": {"length": f"{STEPS} steps", "batch_size": BATCH_SIZE, "precision": "fp32", "gradient_checkpointing": False},
        "ema": {"enabled": False},
        "validation": {"every": None},
        "samples": {"every": None},
        "tracking": {"log_every": "1 step"},
    })  # fmt: skip


def bare_loop(run: Run, batches: list) -> float:
    """Seconds for the steps that nobody can leave out."""
    parts, objective = run.parts, run.parts.objective
    parameters = [p for p in parts.unet.parameters() if p.requires_grad]
    started = time.perf_counter()
    for batch in batches:
        alpha, sigma = objective.schedule.at(batch.timesteps)
        noisy = add_noise(batch.latents, batch.noise, alpha, sigma)
        output = predict(parts.unet, noisy, batch.timesteps, batch.prompt_embeds, batch.pooled_prompt_embeds, batch.time_ids)
        error = per_sample_mse(output, target(objective.prediction, batch.latents, batch.noise, alpha, sigma))
        (objective.weights[batch.timesteps] * error).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    return time.perf_counter() - started


def our_loop(run: Run) -> float:
    started = time.perf_counter()
    with graceful_stop() as stop:
        train(run, stop)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_pictures(folder / "pictures", count=64, seed=0)
        write_tiny_base(folder / "base.safetensors", seed=0)
        run = build_run(config(folder), folder / "runs" / "run", stack, accept_changes=False).run
        run.tasks = run.tasks[:2]  # metrics and timings; a save at the end would be a different question
        with contextlib.closing(run.stream(TrainState())) as stream:
            batches = [next(stream) for _ in range(STEPS)]
        bare_loop(run, batches), our_loop(run)
        pairs = []
        for _ in range(ROUNDS):
            pairs.append((our_loop(run), bare_loop(run, batches)))
    ratios = sorted(ours / bare for ours, bare in pairs)
    result = {
        "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "steps": STEPS, "batch_size": BATCH_SIZE,
        "bare_ms_per_step": round(1000 * statistics.median(bare for _, bare in pairs) / STEPS, 1),
        "ours_ms_per_step": round(1000 * statistics.median(ours for ours, _ in pairs) / STEPS, 1),
        "ratio": {"min": round(ratios[0], 4), "median": round(statistics.median(ratios), 4), "max": round(ratios[-1], 4)},
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"loop_overhead_cpu_{datetime.now(UTC):%Y-%m-%d}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
