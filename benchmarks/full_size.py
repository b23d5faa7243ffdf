"""Full-size SDXL on a machine without a GPU: does it load, train, export and round-trip, and in how much memory?

    python benchmarks/full_size.py FOLDER [--keep]

writes a single file with the official 2,515 tensor names, random bf16 weights, about 6.9 GB, into FOLDER, and then, each
in a process of its own: loads all four networks; caches two pictures; trains two steps at 256x256 px (batch 1, bf16
weights, Adafactor inside the backward pass, gradient checkpointing, no moving average); trains them again with all gradients
waiting, which are the same steps; exports; compares every tensor of an unchanged export with the original, byte by byte.
Beside the peak of the process stands what `aquatint plan` says. Needs about 45 GB of disk and 12 GiB of memory; twenty
minutes on two cores. `--only train` leaves out the stages that no other needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

GIB = 2**30
RESULTS = Path(__file__).parent / "results"


def make(folder: Path) -> dict[str, Any]:
    """The base model with random weights, and two pictures."""
    import torch

    from aquatint.demo.model import random_tensors
    from aquatint.demo.pictures import write_pictures
    from aquatint.models.sdxl.export import write_single_file
    from aquatint.models.sdxl.model import sdxl_spec
    from aquatint.models.sdxl.process import Process
    from aquatint.models.sdxl.shapes import COMPONENTS
    from aquatint.tensor_file import LazyTensor

    def draw(shape: tuple[int, ...], name: str) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.5 / prod(shape[1:]) ** 0.5)

    torch.manual_seed(0)
    spec = sdxl_spec()

    def in_bf16(name: str, tensor: LazyTensor) -> LazyTensor:
        keep = len(tensor.shape) == 0 or tensor.dtype != torch.float32
        return tensor if keep else LazyTensor(torch.bfloat16, tensor.shape, partial(draw, tensor.shape, name))

    components = {c: {name: in_bf16(name, tensor) for name, tensor in random_tensors(c, spec, 0).items()} for c in COMPONENTS}
    write_single_file(folder / "base.safetensors", spec, components, process=Process())
    write_pictures(folder / "pictures", count=2, seed=0)
    return {"bytes": (folder / "base.safetensors").stat().st_size}


def config(folder: Path, *, fused: bool = True) -> Any:
    """The run of this benchmark."""
    from aquatint.config.schema import Config

    training = {"fused_backward": fused, "clip": "delayed" if fused else "global"}
    return Config.model_validate({
        "run": {"name": "fused" if fused else "waiting", "folder": folder / "runs"},
        "model": {"base": folder / "base.safetensors"},
        "data": {"sources": [{"path": str(folder / "pictures")}]},
        "buckets": {"resolution": 256, "min_side": 128, "max_side": 512},
        "cache": {"folder": folder / "cache", "batch_size": 1},
        "loader": {"workers": 0},
        "optimizer": {"name": "adafactor", "learning_rate": 1e-5},
        "training": {"length": "2 steps", "batch_size": 1, "precision": "bf16_pure", "device": "cpu", **training},
        "ema": {"enabled": False},
        "validation": {"every": None, "share": 0.0},
        "samples": {"every": None},
        "tracking": {"log_every": "1 step"},
        "export": {"dtype": "bfloat16"},
    })  # fmt: skip


def load(folder: Path) -> dict[str, Any]:
    """All four networks at once, in the file's bf16."""
    from aquatint.models.sdxl.load import open_base

    base = open_base(folder / "base.safetensors")
    modules = (base.load_unet(), base.load_vae(), *base.load_text_encoders())
    return {"parameters": sum(p.numel() for module in modules for p in module.parameters())}


def planned(run: Any, *phases: str) -> dict[str, float]:
    """What the plan says of the largest of these phases, with the program itself."""
    from aquatint.models.sdxl.model import sdxl_spec
    from aquatint.planning.memory import plan_memory

    plan = plan_memory(run, sdxl_spec())
    largest = max(phase.bytes for phase in plan.phases if phase.name in phases)
    return {"planned_gib": round((largest + plan.outside) / GIB, 2)}


def cache(folder: Path) -> dict[str, Any]:
    from aquatint.training.caching import cache_run

    return {"pictures": cache_run(config(folder)).manifest.listed}


def train(folder: Path, *, fused: bool = True) -> dict[str, Any]:
    """Two steps from the cache, a checkpoint, and the export."""
    from aquatint.training.build import train_run

    result = train_run(config(folder, fused=fused))
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [row["loss"] for row in rows], "exported": str(result.exported[0].relative_to(folder))}


def train_waiting(folder: Path) -> dict[str, Any]:
    """The same steps after the backward pass, when all gradients are there."""
    return train(folder, fused=False)


def round_trip(folder: Path) -> dict[str, Any]:
    """Original -> internal -> original, compared byte by byte."""
    import torch

    from aquatint.models.sdxl.export import export_single_file
    from aquatint.models.sdxl.load import open_base
    from aquatint.models.sdxl.process import Process
    from aquatint.tensor_file import TensorFile, as_bytes

    base, copy = open_base(folder / "base.safetensors"), folder / "copy.safetensors"
    export_single_file(copy, base, base.component("unet"), dtype=torch.bfloat16, process=Process())
    with TensorFile(folder / "base.safetensors") as first, TensorFile(copy) as second:
        names = first.tensors.keys()
        different = [name for name in names if bytes(as_bytes(first.read(name))) != bytes(as_bytes(second.read(name)))]
        layouts = [{name: (info.dtype, info.shape) for name, info in file.tensors.items()} for file in (first, second)]
    copy.unlink()
    return {"tensors": len(names), "different": different, "same_names_shapes_dtypes": layouts[0] == layouts[1]}


STAGES = {stage.__name__: stage for stage in (make, load, cache, train, train_waiting, round_trip)}
NEEDED = ("make", "cache")  # by the stages that train
PLANNED = {
    "cache": lambda folder: planned(config(folder), "encoding captions", "encoding pictures"),
    "train": lambda folder: planned(config(folder), "training"),
    "train_waiting": lambda folder: planned(config(folder, fused=False), "training"),
}


def run_stage(name: str, folder: Path) -> None:
    started = time.perf_counter()
    values = STAGES[name](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(time.perf_counter() - started, 1)
    plan = PLANNED[name](folder) if name in PLANNED else {}  # after the peak is read: a plan takes memory too
    print("RESULT " + json.dumps({"seconds": seconds, "peak_gib": round(peak / GIB, 2), **plan, **values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--only", choices=STAGES, help="this stage alone, with those that it needs")
    parser.add_argument("--keep", action="store_true", help="leave the files in FOLDER")
    arguments = parser.parse_args()
    if arguments.stage:
        return run_stage(arguments.stage, arguments.folder)
    import torch

    results: dict[str, Any] = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}
    for name in STAGES if arguments.only is None else dict.fromkeys((*NEEDED, arguments.only)):
        command = [sys.executable, __file__, str(arguments.folder), "--stage", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1].removeprefix("RESULT "))
        print(f"{name}: {results[name]}", flush=True)
        if "planned_gib" in results[name]:
            print(f"    {results[name]['peak_gib']} GiB measured, {results[name]['planned_gib']} GiB planned", flush=True)
    if not arguments.keep:
        shutil.rmtree(arguments.folder)
    part = f"_{arguments.only}" if arguments.only else ""
    path = RESULTS / f"full_size_cpu{part}_{datetime.now(UTC):%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {path}")
    return None


if __name__ == "__main__":
    main()
