"""How long does an optimizer's step take on a CPU, and per byte that it has to move?

    python benchmarks/optimizer_step.py [--threads 1]

steps a part of the SDXL UNet's list of tensors (every 43rd: 95 million weights; for SOAP every 150th of those below 4 million:
11 million) with every optimizer, in turns, and prints medians, spreads and ratios. References: torch's fused AdamW, and plain loops
for Adafactor and SOAP, written as they are usually written: below. Ours are told, as in training, whether the gradient is finite, and
leave a step out if it is not. A GPU has other ratios: there an update is one kernel, here the size of what lies between operations counts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from aquatint.models.sdxl.model import sdxl_spec
from aquatint.optim.create import create_optimizer
from aquatint.optim.tensorwise import TensorwiseOptimizer

ROUNDS, EVERY, EVERY_SOAP, LARGEST_SOAP, REFRESH = 7, 43, 150, 4_000_000, 10
SOAP_ROUNDS = 2 * REFRESH
CAP = 1280
RESULTS = Path(__file__).parent / "results"
COMMON = {"learning_rate": 1e-5, "weight_decay": 0.01}
BYTES_MOVED = {  # per weight, if nothing lay between: read and write of weight and state, read of the gradient
    "torch AdamW, fused, float32": 28, "torch AdamW, loop, float32": 28, "adamw_bf16": 14, "adamw_bf16, kahan": 18, "adamw8bit": 10.1,
}  # fmt: skip


class PlainAdafactor(Optimizer):
    """One tensor after another, factored over the last two dimensions, float32 in between."""

    def __init__(self, params: Sequence[Parameter]) -> None:
        super().__init__(params, {"lr": 1e-5, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.update(param, group)

    def update(self, param: Parameter, group: dict[str, Any]) -> None:
        grad, state = param.grad.float(), self.state[param]
        if not state:
            state["step"] = 0
            if grad.dim() > 1:
                state["row"], state["col"] = torch.zeros(grad.shape[:-1]), torch.zeros(grad.shape[:-2] + grad.shape[-1:])
            else:
                state["sq"] = torch.zeros_like(grad)
        state["step"] += 1
        decay = 1 - state["step"] ** -0.8
        square = grad**2 + 1e-30
        if grad.dim() > 1:
            state["row"].mul_(decay).add_(square.mean(dim=-1), alpha=1 - decay)
            state["col"].mul_(decay).add_(square.mean(dim=-2), alpha=1 - decay)
            row = (state["row"] / state["row"].mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
            update = row * state["col"].unsqueeze(-2).rsqrt() * grad
        else:
            state["sq"].mul_(decay).add_(square, alpha=1 - decay)
            update = state["sq"].rsqrt() * grad
        update.div_((update.norm(2) / update.numel() ** 0.5).clamp_(min=1.0)).mul_(group["lr"])
        value = param.float()
        value.add_(value, alpha=-group["weight_decay"] * group["lr"]).sub_(update)
        param.copy_(value)


class PlainSoap(Optimizer):
    """One tensor after another, every dimension rotated by a tensor product, the momentum rotated back and forth at every step."""

    def __init__(self, params: Sequence[Parameter]) -> None:
        super().__init__(params, {"lr": 1e-5, "betas": (0.95, 0.95), "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self.update(param, group)

    @staticmethod
    def rotated(tensor: torch.Tensor, bases: list[torch.Tensor | None], axis: int) -> torch.Tensor:
        for basis in bases:
            tensor = tensor.movedim(0, -1) if basis is None else torch.tensordot(tensor, basis, dims=([0], [axis]))
        return tensor

    def update(self, param: Parameter, group: dict[str, Any]) -> None:
        grad, state, (beta1, beta2) = param.grad.float(), self.state[param], group["betas"]
        if not state:
            sides = [size if grad.dim() > 1 and size <= CAP else 0 for size in grad.shape]
            state.update(step=0, m=torch.zeros_like(grad), v=torch.zeros_like(grad))
            state["gram"] = [torch.zeros(size, size) if size else None for size in sides]
            self.accumulate(state, grad, beta2)
            state["basis"] = [None if gram is None else torch.linalg.eigh(gram)[1].flip(1) for gram in state["gram"]]
            return
        state["step"] += 1
        step = state["step"]
        rotated = self.rotated(grad, state["basis"], 0)
        state["m"].mul_(beta1).add_(rotated, alpha=1 - beta1)
        state["v"].mul_(beta2).add_(rotated.square(), alpha=1 - beta2)
        scale = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        param.add_(self.rotated(state["m"] / (state["v"].sqrt() + 1e-8), state["basis"], 1), alpha=-scale)
        param.add_(param, alpha=-group["lr"] * group["weight_decay"])
        state["m"] = self.rotated(state["m"], state["basis"], 1)
        self.accumulate(state, grad, beta2)
        if step % REFRESH == 0:
            self.refresh(state)
        state["m"] = self.rotated(state["m"], state["basis"], 0)

    @staticmethod
    def accumulate(state: dict[str, Any], grad: torch.Tensor, beta: float) -> None:
        for dim, gram in enumerate(state["gram"]):
            if gram is not None:
                others = [other for other in range(grad.dim()) if other != dim]
                gram.lerp_(torch.tensordot(grad, grad, dims=(others, others)), 1 - beta)

    @staticmethod
    def refresh(state: dict[str, Any]) -> None:
        for dim, (gram, basis) in enumerate(zip(state["gram"], state["basis"], strict=True)):
            if gram is not None:
                order = (basis.T @ gram @ basis).diag().argsort(descending=True)
                state["v"] = state["v"].index_select(dim, order)
                state["basis"][dim] = torch.linalg.qr(gram @ basis[:, order]).Q


def weights(every: int, dtype: torch.dtype) -> list[Parameter]:
    """A part of the UNet's tensors, with gradients."""
    bits = torch.Generator().manual_seed(0)
    largest = LARGEST_SOAP if every == EVERY_SOAP else math.inf
    shapes = [shape for shape in sdxl_spec().shapes("unet").values() if math.prod(shape) <= largest][::every]
    params = [Parameter((0.02 * torch.randn(shape, generator=bits)).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (1e-3 * torch.randn(param.shape, generator=bits)).to(dtype)
    return params


def ours(name: str, dtype: torch.dtype, every: int = EVERY, **settings: Any) -> Optimizer:
    named = [(str(index), param) for index, param in enumerate(weights(every, dtype))]
    return create_optimizer(name, named, seed=0, **COMMON, **settings)


def contenders() -> dict[str, Callable[[], Optimizer]]:
    float32, bfloat16 = torch.float32, torch.bfloat16
    return {
        "torch AdamW, fused, float32": lambda: torch.optim.AdamW(weights(EVERY, float32), lr=1e-5, fused=True),
        "torch AdamW, loop, float32": lambda: torch.optim.AdamW(weights(EVERY, float32), lr=1e-5, foreach=False),
        "adamw_bf16": lambda: ours("adamw_bf16", bfloat16),
        "adamw_bf16, kahan": lambda: ours("adamw_bf16", bfloat16, rounding="kahan"),
        "adamw8bit": lambda: ours("adamw8bit", bfloat16),
        "plain Adafactor, float32": lambda: PlainAdafactor(weights(EVERY, float32)),
        "adafactor, float32": lambda: ours("adafactor", float32),
        "plain Adafactor, bf16 rounded to the nearest": lambda: PlainAdafactor(weights(EVERY, bfloat16)),
        "adafactor, bf16": lambda: ours("adafactor", bfloat16),
    }


def soap_contenders() -> dict[str, Callable[[], Optimizer]]:
    settings = {"max_precond_dim": CAP, "precond_every": REFRESH}
    return {
        "plain SOAP, float32": lambda: PlainSoap(weights(EVERY_SOAP, torch.float32)),
        "soap, float32": lambda: ours("soap", torch.float32, EVERY_SOAP, **settings),
        "soap, bf16": lambda: ours("soap", torch.bfloat16, EVERY_SOAP, **settings),
    }


def take_step(optimizer: Optimizer, finite: torch.Tensor) -> None:
    if isinstance(optimizer, TensorwiseOptimizer):
        optimizer.step(finite=finite)
    else:
        optimizer.step()


def measure(makers: dict[str, Callable[[], Optimizer]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each step of each optimizer, in turns."""
    optimizers, finite = {name: make() for name, make in makers.items()}, torch.tensor(True)
    for _ in range(warmup):
        for optimizer in optimizers.values():
            take_step(optimizer, finite)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            started = time.perf_counter()
            take_step(optimizer, finite)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def row(name: str, seconds: list[float], count: int) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(seconds, n=4)
    found: dict[str, Any] = {
        "median_ms": round(1000 * middle, 1), "quartiles_ms": [round(1000 * low, 1), round(1000 * high, 1)],
        "ns_per_weight": round(1e9 * middle / count, 2),
    }  # fmt: skip
    if name in BYTES_MOVED:
        found["gb_per_second"] = round(BYTES_MOVED[name] * count / middle / 1e9, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    count, soap_count = (sum(param.numel() for param in weights(every, torch.bfloat16)) for every in (EVERY, EVERY_SOAP))
    rows = {name: row(name, seconds, count) for name, seconds in measure(contenders(), ROUNDS, 2).items()}
    soap = measure(soap_contenders(), SOAP_ROUNDS, 2)
    for name, seconds in soap.items():  # a refresh is part of the price: means, not medians
        rows[name] = {
            "mean_ms": round(1000 * statistics.mean(seconds), 1), "slowest_ms": round(1000 * max(seconds), 1),
            "ns_per_weight": round(1e9 * statistics.mean(seconds) / soap_count, 2),
        }  # fmt: skip

    def times_faster(reference: str, mine: str) -> float:
        return round(rows[reference]["ns_per_weight"] / rows[mine]["ns_per_weight"], 2)

    fused = rows["torch AdamW, fused, float32"]["gb_per_second"]
    result = {
        "python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads(), "rounds": ROUNDS,
        "weights": count, "weights_soap": soap_count, "max_precond_dim": CAP, "precond_every": REFRESH, "steps": rows,
        "speed_per_byte_against_torch_fused": {
            name: round(rows[name]["gb_per_second"] / fused, 3) for name in ("adamw_bf16", "adamw_bf16, kahan", "adamw8bit")
        },
        "times_faster_than_plain": {
            "adafactor, float32": times_faster("plain Adafactor, float32", "adafactor, float32"),
            "adafactor, bf16": times_faster("plain Adafactor, bf16 rounded to the nearest", "adafactor, bf16"),
            "soap, float32": times_faster("plain SOAP, float32", "soap, float32"),
            "soap, bf16": times_faster("plain SOAP, float32", "soap, bf16"),
        },
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"optimizer_step_cpu_{datetime.now(UTC):%Y-%m-%d}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
