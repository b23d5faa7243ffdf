"""How long do GroupNorm with SiLU, GEGLU, projections and convolutions of SDXL take on one GPU: plain, compiled by inductor, and ours?

    PYTHONPATH=src python3 -m benchmarks.gpu.operations --contender "GroupNorm and SiLU" [--dry]

Forward and backward pass in bf16, in the sizes of SDXL's three levels at 1024 px, for one picture and for eight. `plain` is torch's own
operation after operation with channels first; the ways are those of `benchmarks/unet_settings.py`;
what is compiled are torch's own operations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.rig import Marks, Scene, finish
from benchmarks.machine import spread
from benchmarks.unet_settings import Act, Ways, acts, convolutions, gates, norms, projections

WARMUP, STEPS = 5, 30
Kind = Callable[[torch.device, torch.dtype, tuple[int, ...]], Ways]
PICTURES = ((320, 128, 128), (960, 128, 128), (640, 64, 64), (1280, 32, 32), (2560, 32, 32))
LEVELS = ((4096, 640), (1024, 1280))  # tokens of a picture, and their width
CONTENDERS: dict[str, tuple[Kind, Callable[[int], list[tuple[int, ...]]]]] = {
    "GroupNorm and SiLU": (norms, lambda count: [(count, *shape) for shape in PICTURES]),
    "convolution": (convolutions, lambda count: [(count, *shape) for shape in (PICTURES[0], *PICTURES[2:4])]),
    "GEGLU": (gates, lambda count: [(count * tokens, width) for tokens, width in LEVELS]),
    "projections": (projections, lambda count: [(count, tokens, width) for tokens, width in LEVELS]),
}


def measure(name: str, scene: Scene) -> dict[str, Any]:
    """Milliseconds by size and way."""
    build, shapes = CONTENDERS[name]
    sizes = [(1, *(32 for _ in shapes(1)[0][1:]))] if scene.is_dry else [shape for count in (1, 8) for shape in shapes(count)]
    found = {}
    for shape in sizes:
        ways = build(scene.device, torch.bfloat16, shape)
        for way, act in acts(ways if scene.is_dry else with_compiled(ways)).items():
            found[f"{'x'.join(map(str, shape))}, {way}"] = timed(act, scene)
    return {"ms": found}


def with_compiled(ways: Ways) -> Ways:
    """All ways, and those that are torch's own operations compiled too."""
    compiled = {f"{name}, compiled": (torch.compile(way, dynamic=False), tensors) for name, (way, tensors) in ways.items() if name != "own"}
    return {**ways, **compiled}


def timed(act: Act, scene: Scene) -> list[float]:
    for _ in range(1 if scene.is_dry else WARMUP):
        act()
    marks = Marks(scene.device)
    for _ in range(2 if scene.is_dry else STEPS):
        marks.mark("step")
        act()
    marks.mark("step")
    finish(scene.device)
    return spread([marks.ms(one["step"], one["end"]) for one in marks.steps()], 4)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=list(CONTENDERS), required=True)
    parser.add_argument("--dry", action="store_true", help="one small size on the CPU, to see that it runs")
    chosen = parser.parse_args(arguments)
    print("RESULT " + json.dumps(measure(chosen.contender, Scene.of(dry=chosen.dry))), flush=True)


if __name__ == "__main__":
    main()
