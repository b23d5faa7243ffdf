"""How long does each optimizer take to step all 1,680 tensors of SDXL's UNet on one GPU, and how much memory?

    PYTHONPATH=src python3 -m benchmarks.gpu.optimizers --contender adamw_bf16 [--dry]

Each is compared with its floor: the bytes that it cannot avoid to move, at the 4.3 TB/s that an H200 copies with. Means count where
a step in ten does more than the others (SOAP). Optimizers of bitsandbytes and torchao are left out where those are not installed.
`clip` is the norm of all gradients and their scaling, on its own; `factorisations` times what SOAP's refresh is made of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.nn import Parameter

from aquatint.optim.clipping import Clipping, tensor_norms
from aquatint.optim.create import create_optimizer
from benchmarks.gpu.rig import GIB, Marks, Scene, finish
from benchmarks.machine import has, spread

BYTES_PER_SECOND = 4.3e12
WARMUP, STEPS, SECONDS, REFRESH, LARGEST_SIDE = 2, 10, 60.0, 10, 2048
COMMON = {"learning_rate": 1e-5, "weight_decay": 0.01}
SIDES = (640, 1280, 2048, 5120)
BYTES_MOVED = {  # per weight: weight and state read and written, gradient read
    "adamw": 28, "torch AdamW, fused, float32": 28, "torch AdamW, foreach, float32": 28, "torch AdamW, fused, bfloat16": 14,
    "adamw_bf16": 14, "adamw_bf16, kahan": 18, "adamw8bit": 10.1, "adafactor": 10, "transformers Adafactor": 10,
    "bitsandbytes AdamW8bit": 10.1, "torchao AdamW8bit": 10.1, "clip, ours": 6, "clip, torch": 6,
}  # fmt: skip
Step = Callable[[], object]


def weights(scene: Scene, dtype: torch.dtype) -> list[tuple[str, Parameter]]:
    """The UNet's tensors with gradients, under their names."""
    shapes = scene.spec.shapes("unet")
    if scene.is_dry:
        shapes = {name: shape for name, shape in list(shapes.items())[::40] if prod(shape) < 50_000}
    bits = torch.Generator(scene.device).manual_seed(0)
    named = []
    for name, shape in shapes.items():
        param = Parameter(torch.empty(shape, dtype=dtype, device=scene.device).normal_(std=0.02, generator=bits))
        param.grad = torch.empty_like(param).normal_(std=1e-3, generator=bits)
        named.append((name, param))
    return named


def ours(name: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Callable[[Scene], Step]:
    return lambda scene: create_optimizer(name, weights(scene, dtype), seed=0, **COMMON, **settings).step


def of_torch(dtype: torch.dtype, **settings: Any) -> Callable[[Scene], Step]:
    return lambda scene: torch.optim.AdamW(plain(weights(scene, dtype)), lr=1e-5, **settings).step


def plain(named: Sequence[tuple[str, Parameter]]) -> list[Parameter]:
    return [param for _, param in named]


def of_transformers(scene: Scene) -> Step:
    from transformers.optimization import Adafactor

    step: Step = Adafactor(plain(weights(scene, torch.bfloat16)), lr=1e-5, relative_step=False, scale_parameter=False).step
    return step


def of_bitsandbytes(scene: Scene) -> Step:
    from bitsandbytes.optim import AdamW8bit

    step: Step = AdamW8bit(plain(weights(scene, torch.bfloat16)), lr=1e-5).step
    return step


def of_torchao(scene: Scene) -> Step:
    from torchao.optim import AdamW8bit

    step: Step = AdamW8bit(plain(weights(scene, torch.bfloat16)), lr=1e-5, bf16_stochastic_round=True).step
    return step


def our_clip(scene: Scene) -> Step:
    params, clipping = plain(weights(scene, torch.bfloat16)), Clipping("global", 1e9, device=scene.device)
    return lambda: clipping.clip_(params, tensor_norms(params))


def torch_clip(scene: Scene) -> Step:
    params = plain(weights(scene, torch.bfloat16))
    return lambda: torch.nn.utils.clip_grad_norm_(params, 1e9)


CONTENDERS: dict[str, Callable[[Scene], Step]] = {
    "torch AdamW, fused, float32": of_torch(torch.float32, fused=True),
    "torch AdamW, foreach, float32": of_torch(torch.float32, foreach=True),
    "torch AdamW, fused, bfloat16": of_torch(torch.bfloat16, fused=True),
    "adamw": ours("adamw", torch.float32),
    "adamw_bf16": ours("adamw_bf16"),
    "adamw_bf16, kahan": ours("adamw_bf16", rounding="kahan"),
    "adamw8bit": ours("adamw8bit"),
    "bitsandbytes AdamW8bit": of_bitsandbytes,
    "torchao AdamW8bit": of_torchao,
    "adafactor": ours("adafactor"),
    "transformers Adafactor": of_transformers,
    "soap": ours("soap", max_precond_dim=LARGEST_SIDE, precond_every=REFRESH),
    "clip, ours": our_clip,
    "clip, torch": torch_clip,
}
NEEDS = {"bitsandbytes AdamW8bit": "bitsandbytes", "torchao AdamW8bit": "torchao"}


def measure(name: str, scene: Scene) -> dict[str, Any]:
    step = CONTENDERS[name](scene)
    count = sum(prod(shape) for shape in scene.spec.shapes("unet").values())
    started = time.perf_counter()
    for _ in range(1 if scene.is_dry else WARMUP):
        step()
    finish(scene.device)
    warmed = time.perf_counter() - started
    base = allocated(scene)
    marks, began = Marks(scene.device), time.perf_counter()
    for _ in range(2 if scene.is_dry else STEPS):
        marks.mark("step")
        step()
        if time.perf_counter() - began > SECONDS:
            break
    marks.mark("step")
    finish(scene.device)
    taken = [marks.ms(one["step"], one["end"]) for one in marks.steps()]
    found = {
        "ms_per_step": spread(taken, 2), "mean_ms": round(statistics.mean(taken), 2), "slowest_ms": round(max(taken), 2),
        "steps": len(taken), "first_steps_seconds": round(warmed, 1), "between_steps_gib": base, "peak_gib": peak(scene),
    }  # fmt: skip
    if name in BYTES_MOVED:
        floor = 1000 * count * BYTES_MOVED[name] / BYTES_PER_SECOND
        found |= {"floor_ms": round(floor, 2), "times_the_floor": round(found["ms_per_step"][1] / floor, 2)}
    return found


def allocated(scene: Scene) -> float | None:
    """With weights, gradients and state; the peak counts from here on."""
    if scene.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return round(torch.cuda.memory_allocated() / GIB, 2)


def peak(scene: Scene) -> float | None:
    return round(torch.cuda.max_memory_allocated() / GIB, 2) if scene.device.type == "cuda" else None


def factorisations(scene: Scene) -> dict[str, Any]:
    """Milliseconds of one QR decomposition and of one by two Cholesky factorisations, float32."""
    found = {}
    for side in (16, 32) if scene.is_dry else SIDES:
        matrix = torch.randn(side, side, device=scene.device)
        ways: dict[str, Step] = {"qr": lambda matrix=matrix: torch.linalg.qr(matrix), "cholesky_qr2": lambda matrix=matrix: twice(matrix)}
        for name, way in ways.items():
            way()
            marks = Marks(scene.device)
            for _ in range(3):
                marks.mark("step")
                way()
            marks.mark("step")
            finish(scene.device)
            found[f"{name}, {side}"] = spread([marks.ms(one["step"], one["end"]) for one in marks.steps()], 3)
    return {"ms": found}


def twice(matrix: torch.Tensor) -> torch.Tensor:
    """Q of CholeskyQR2 (arXiv 1401.1999, algorithm 2); a small ridge keeps a random square matrix positive."""
    for _ in range(2):
        gram = matrix.T @ matrix
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())
        factor = torch.linalg.cholesky_ex(gram, upper=True).L
        matrix = torch.linalg.solve_triangular(factor, matrix, upper=True, left=False)
    return matrix


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contender", choices=[*CONTENDERS, "factorisations"], required=True)
    parser.add_argument("--dry", action="store_true", help="a few small tensors on the CPU, to see that it runs")
    chosen = parser.parse_args(arguments)
    if chosen.contender in NEEDS and not has(NEEDS[chosen.contender]):
        raise SystemExit(f"{NEEDS[chosen.contender]} is not installed")
    scene = Scene.of(dry=chosen.dry)
    found = factorisations(scene) if chosen.contender == "factorisations" else measure(chosen.contender, scene)
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
