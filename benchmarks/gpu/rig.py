"""How a row is measured: random weights made on the device, batches from pinned memory, times by events.

On a machine without a GPU, `--dry` goes the same way with a tiny model: it shows that a row runs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from aquatint.demo.model import tiny_spec
from aquatint.errors import full_memory
from aquatint.models.sdxl.model import ModelSpec, sdxl_spec
from benchmarks.machine import spread
from benchmarks.ours import Loop, draw_batches

NOMINAL_FLOPS, MEASURED_FLOPS = 989e12, 790e12  # of an H100 or H200 in dense bf16: by its data sheet, and as a matrix product reaches it
POOL, WARMUP, STEPS, LEAST_STEPS, SECONDS = 64, 5, 20, 8, 30.0
GIB = 2**30
PHASES = ("forward", "backward and clip", "optimizer")


@dataclass(frozen=True)
class Row:
    """One line of the plan. `batch_sizes`: the one that is wanted, and what is tried in its place where memory does not do."""

    number: int
    what: str
    side_px: int
    batch_sizes: tuple[int, ...]
    contenders: tuple[str, ...]
    checkpointing: bool = False

    def dry(self) -> Row:
        return Row(self.number, self.what, 128, (2,), self.contenders, self.checkpointing)


@dataclass(frozen=True)
class Scene:
    """Where it happens."""

    device: torch.device
    spec: ModelSpec
    is_dry: bool

    @classmethod
    def of(cls, *, dry: bool) -> Scene:
        if not dry and not torch.cuda.is_available():
            raise SystemExit("no GPU was found; --dry tries the same with a tiny model on the CPU")
        return cls(torch.device("cpu" if dry else "cuda"), tiny_spec() if dry else sdxl_spec(), dry)


@dataclass
class Contender:
    """A loop, and the modules whose hooks tell the phases of its steps; no modules, no phases."""

    loop: Loop
    unet: Any = None
    optimizer: Any = None
    notes: dict[str, Any] = field(default_factory=dict)


Build = Callable[[Row, Scene, int], Contender]


@torch.no_grad()
def filled(module: Any, scene: Scene, dtype: torch.dtype) -> Any:
    """A module of the meta device with random weights on the device, which keep the scale of what goes through it."""
    module = torch.nn.Module.to(module, dtype).to_empty(device=scene.device)  # diffusers' own `to` warns of what it then does
    bits = torch.Generator(scene.device).manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.5 / prod(parameter.shape[1:]) ** 0.5, generator=bits)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


def pool(row: Row, scene: Scene, batch_size: int) -> Iterator[Any]:
    """Batches without end, out of 64 samples in pinned memory."""
    count = max(1, (4 if scene.is_dry else POOL) // batch_size)
    batches = draw_batches(scene.spec.unet, count, batch_size, row.side_px // 8)
    while True:
        yield from batches


def training_flops(unet: Any, row: Row, scene: Scene) -> int:
    """Operations of one picture, forward and backward, without what is computed again. `unet`: on the meta device, as it is trained."""
    batch = next(draw for draw in draw_batches(scene.spec.unet, 1, 1, row.side_px // 8)).to("meta")
    conditions = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.time_ids}
    with FlopCounterMode(display=False) as counter:
        output = unet(batch.latents, batch.timesteps, encoder_hidden_states=batch.prompt_embeds, added_cond_kwargs=conditions)[0]
        output.sum().backward()
    return int(counter.get_total_flops())


# Time


class Marks:
    """Moments: events on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.made: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.made.append((name, event))
        else:
            self.made.append((name, time.perf_counter()))

    def ms(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second)) if self.device.type == "cuda" else 1000 * (second - first)

    def steps(self) -> list[dict[str, Any]]:
        """The marks of each step by name, with the beginning of the next one as its end."""
        found: list[dict[str, Any]] = []
        for name, moment in self.made:
            if name == "step":
                if found:
                    found[-1]["end"] = moment
                found.append({})
            found[-1][name] = moment
        return found[:-1]


def marked(batches: Iterator[Any], marks: Marks) -> Iterator[Any]:
    for batch in batches:
        marks.mark("step")
        yield batch


def hooked(contender: Contender, marks: Marks) -> list[Any]:
    if contender.unet is None or contender.optimizer is None:
        return []
    return [
        contender.unet.register_forward_hook(lambda *_: marks.mark("predicted")),
        contender.optimizer.register_step_pre_hook(lambda *_: marks.mark("descends")),
        contender.optimizer.register_step_post_hook(lambda *_: marks.mark("descended")),
    ]


def phases_of(steps: Sequence[dict[str, Any]], marks: Marks) -> dict[str, float] | None:
    """Median milliseconds of each phase; None where the loop does not tell."""
    if not steps or not all({"predicted", "descends", "descended"} <= step.keys() for step in steps):
        return None
    borders = ("step", "predicted", "descends", "descended")
    return {
        phase: round(statistics.median(marks.ms(step[first], step[last]) for step in steps), 2)
        for phase, first, last in zip(PHASES, borders, borders[1:], strict=False)
    }


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(contender: Contender, batches: Iterator[Any], scene: Scene) -> dict[str, Any]:
    """Steps after warm-up, as many as fit into the time, and what they took."""
    warmup, steps = (1, 2) if scene.is_dry else (WARMUP, STEPS)
    started = time.perf_counter()
    contender.loop(batches, warmup)
    finish(scene.device)
    first = time.perf_counter() - started
    started = time.perf_counter()
    contender.loop(batches, 1)
    finish(scene.device)
    steps = min(steps, max(LEAST_STEPS, int(SECONDS / (time.perf_counter() - started))))
    if scene.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    marks = Marks(scene.device)
    hooks = hooked(contender, marks)
    losses = contender.loop(marked(batches, marks), steps)
    marks.mark("step")
    finish(scene.device)
    for hook in hooks:
        hook.remove()
    taken = marks.steps()
    return {
        "ms_per_step": spread([marks.ms(step["step"], step["end"]) for step in taken], 2),
        "phases_ms": phases_of(taken, marks),
        "steps": len(taken),
        "first_steps_seconds": round(first, 1),
        "loss": round(float(losses[-1]), 5),
        **memory(scene.device),
        "kernels_per_step": kernels(contender, batches, scene.device),
        "waits_per_step": waits(contender, batches, scene.device),
    }


# What a step asks of the machine


def memory(device: torch.device) -> dict[str, float | None]:
    if device.type != "cuda":
        return {"peak_allocated_gib": None, "peak_reserved_gib": None}
    return {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
    }


def kernels(contender: Contender, batches: Iterator[Any], device: torch.device) -> dict[str, int] | None:
    """What runs on the GPU in one step, and how often the host starts something there: a graph is started once. None without a profiler."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        contender.loop(batches, 1)
        finish(device)
    events = profiled.events() or []
    on_device = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    started = sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")) for event in events)
    return {"on_device": on_device, "starts": started} if on_device else None


def waits(contender: Contender, batches: Iterator[Any], device: torch.device) -> int | None:
    """How often the host stands still for the GPU in one step, as torch warns of it."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            contender.loop(batches, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# A row


def fits(row: Row, scene: Scene, build: Build, batches: Callable[[Row, Scene, int], Iterator[Any]]) -> dict[str, Any]:
    """The row with the first of its batch sizes for which there is memory."""
    for batch_size in row.batch_sizes:
        try:
            contender = build(row, scene, batch_size)
            return {"batch_size": batch_size, **measure(contender, batches(row, scene, batch_size), scene), **contender.notes}
        except RuntimeError as error:
            if full_memory(error) is None:
                raise
            print(f"batch {batch_size} does not fit", flush=True)
        contender = None  # type: ignore[assignment]
        gc.collect()
        torch.cuda.empty_cache()
    return {"batch_size": None, "failed": f"out of memory with a batch of {row.batch_sizes[-1]}"}


def speeds(found: dict[str, Any], flops: int) -> dict[str, Any]:
    """Pictures a second, and how much of the GPU's arithmetic that is; `flops` is of one picture."""
    if found["batch_size"] is None:
        return found
    pictures = 1000 * found["batch_size"] / found["ms_per_step"][1]
    shares = {"mfu_of_989": NOMINAL_FLOPS, "share_of_790": MEASURED_FLOPS}
    return {
        "pictures_per_second": round(pictures, 2), **{name: round(pictures * flops / peak, 4) for name, peak in shares.items()},
        "teraflop_per_picture": round(flops / 1e12, 3), **found,
    }  # fmt: skip


def main_of(
    doc: str,
    rows: Mapping[int, Row],
    builds: Mapping[str, Build],
    flops: Callable[[Row, Scene], int],
    batches: Callable[[Row, Scene, int], Iterator[Any]] = pool,
    arguments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures one contender of one row and prints it, as the last line, for `run` to read."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, choices=rows, required=True)
    parser.add_argument("--contender", required=True)
    parser.add_argument("--dry", action="store_true", help="a tiny model on the CPU, to see that it runs")
    chosen = parser.parse_args(arguments)
    if chosen.contender not in rows[chosen.row].contenders:
        parser.error(f"row {chosen.row} has {', '.join(rows[chosen.row].contenders)}")
    scene = Scene.of(dry=chosen.dry)
    row = rows[chosen.row].dry() if chosen.dry else rows[chosen.row]
    found = speeds(fits(row, scene, builds[chosen.contender], batches), flops(row, scene))
    print("RESULT " + json.dumps(found), flush=True)
    return found
