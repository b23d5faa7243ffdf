"""How long does an optimizer's step take on a CPU, and per byte that it has to move? Does it go where others go?

    python -m benchmarks.optimizer_step [adamw adafactor soap one_tensor parity] [--threads 1] [--result FILE]

steps a part of the SDXL UNet's list of tensors (every 43rd: 95 million weights; for SOAP every 150th of those below 4 million:
11 million) with every optimizer of a group, in turns, and keeps medians and quartiles of processor time and of the clock. One group
at a time, or some; those of a result that is there already are kept, and each says when it was measured. References: torch's fused
AdamW, and plain loops for Adafactor and SOAP, written as they are usually written: below. Ours are told, as in training, whether the
gradient is finite. Peers are those that can be imported of transformers, torchao, bitsandbytes and pytorch_optimizer. A GPU has other
ratios: there an update is one kernel.

OMP_NUM_THREADS should be what --threads is: NumPy, which SOAP uses, goes by it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from aquatint.models.sdxl.model import sdxl_spec
from aquatint.optim.create import create_optimizer
from aquatint.optim.tensorwise import TensorwiseOptimizer

ROUNDS, EVERY, EVERY_SOAP, LARGEST_SOAP, REFRESH = 7, 43, 150, 4_000_000, 10
SOAP_ROUNDS = REFRESH  # each tensor refreshes its bases once
WARMUP, CAP, PARITY_STEPS = 2, 1280, 200
ONE_TENSOR, SMALL = (1280, 5120), (64, 256)
RESULTS = Path(__file__).parent / "results"
COMMON = {"learning_rate": 1e-5, "weight_decay": 0.01}
FUSED = "torch AdamW, fused, float32"
BYTES_MOVED = {  # per weight, if nothing lay between: read and write of weight and state, read of the gradient
    "torch AdamW": 28, "adamw_bf16, kahan": 18, "adamw_bf16": 14, "adamw8bit": 10.1, "torchao AdamW8bit": 10.1,
    "bitsandbytes AdamW8bit": 10.1,
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
        if (step + 1) % REFRESH == 0:  # at the step at which ours is, which counts the first one
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


Makers = dict[str, Callable[[], Optimizer]]
Clocks = dict[str, dict[str, list[float]]]


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def peer(module: str, name: str, params: list[Parameter], **settings: Any) -> Optimizer:
    optimizer: Optimizer = getattr(importlib.import_module(module), name)(params, lr=1e-5, weight_decay=0.01, **settings)
    return optimizer


def adamw_group() -> Makers:
    float32, bfloat16 = torch.float32, torch.bfloat16
    makers: Makers = {
        FUSED: lambda: torch.optim.AdamW(weights(EVERY, float32), lr=1e-5, fused=True),
        "torch AdamW, foreach, float32": lambda: torch.optim.AdamW(weights(EVERY, float32), lr=1e-5, foreach=True),
        "torch AdamW, loop, float32": lambda: torch.optim.AdamW(weights(EVERY, float32), lr=1e-5, foreach=False),
    }
    for kernel in ("compiled", "none"):
        suffix = "compiled" if kernel == "compiled" else "plain torch"
        makers[f"adamw_bf16, {suffix}"] = lambda kernel=kernel: ours("adamw_bf16", bfloat16, kernel=kernel)
        makers[f"adamw_bf16, kahan, {suffix}"] = lambda kernel=kernel: ours("adamw_bf16", bfloat16, kernel=kernel, rounding="kahan")
        makers[f"adamw8bit, {suffix}"] = lambda kernel=kernel: ours("adamw8bit", bfloat16, kernel=kernel)
    return makers


def adafactor_group() -> Makers:
    float32, bfloat16 = torch.float32, torch.bfloat16
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    makers: Makers = {
        "plain Adafactor, float32": lambda: PlainAdafactor(weights(EVERY, float32)),
        "adafactor, float32": lambda: ours("adafactor", float32),
        "plain Adafactor, bf16 rounded to the nearest": lambda: PlainAdafactor(weights(EVERY, bfloat16)),
        "adafactor, bf16": lambda: ours("adafactor", bfloat16),
        "torch Adafactor, float32": lambda: torch.optim.Adafactor(weights(EVERY, float32), lr=1e-5),
        "transformers Adafactor, float32": lambda: peer("transformers.optimization", "Adafactor", weights(EVERY, float32), **fixed),
    }
    if has("pytorch_optimizer"):
        for name in ("AdaFactor", "CAME"):
            makers[f"pytorch_optimizer {name}, float32"] = lambda name=name: peer("pytorch_optimizer", name, weights(EVERY, float32))
    return makers


def soap_group() -> Makers:
    settings = {"max_precond_dim": CAP, "precond_every": REFRESH}
    makers: Makers = {
        "plain SOAP, float32": lambda: PlainSoap(weights(EVERY_SOAP, torch.float32)),
        "soap, float32": lambda: ours("soap", torch.float32, EVERY_SOAP, **settings),
        "plain SOAP, bf16 rounded to the nearest": lambda: PlainSoap(weights(EVERY_SOAP, torch.bfloat16)),
        "soap, bf16": lambda: ours("soap", torch.bfloat16, EVERY_SOAP, **settings),
    }
    if has("pytorch_optimizer"):
        theirs = {"max_precondition_dim": CAP, "precondition_frequency": REFRESH}
        makers["pytorch_optimizer SOAP, float32"] = lambda: peer("pytorch_optimizer", "SOAP", weights(EVERY_SOAP, torch.float32), **theirs)
    return makers


def one_tensor_group() -> Makers:
    """Torchao compiles for every shape anew, and so it is compared on one."""
    makers: Makers = {
        FUSED: lambda: torch.optim.AdamW([tensor(ONE_TENSOR, torch.float32)], lr=1e-5, fused=True),
        "adamw8bit, compiled": lambda: ours_of("adamw8bit", tensor(ONE_TENSOR, torch.bfloat16), kernel="compiled"),
        "adamw8bit, plain torch": lambda: ours_of("adamw8bit", tensor(ONE_TENSOR, torch.bfloat16), kernel="none"),
    }
    if has("torchao"):
        rounding = {"bf16_stochastic_round": True}
        makers["torchao AdamW8bit"] = lambda: peer("torchao.optim", "AdamW8bit", [tensor(ONE_TENSOR, torch.bfloat16)], **rounding)
    if has("bitsandbytes"):
        makers["bitsandbytes AdamW8bit"] = lambda: peer("bitsandbytes.optim", "AdamW8bit", [tensor(ONE_TENSOR, torch.bfloat16)])
    return makers


GROUPS: dict[str, tuple[Callable[[], Makers], int]] = {
    "adamw": (adamw_group, ROUNDS),
    "adafactor": (adafactor_group, ROUNDS),
    "soap": (soap_group, SOAP_ROUNDS),
    "one_tensor": (one_tensor_group, 3 * ROUNDS),
}


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Parameter:
    bits = torch.Generator().manual_seed(0)
    param = Parameter((0.02 * torch.randn(shape, generator=bits)).to(dtype))
    param.grad = (1e-3 * torch.randn(shape, generator=bits)).to(dtype)
    return param


def ours_of(name: str, param: Parameter, **settings: Any) -> Optimizer:
    return create_optimizer(name, [("weight", param)], seed=0, **{**COMMON, **settings})


def take_step(optimizer: Optimizer, finite: torch.Tensor) -> None:
    if isinstance(optimizer, TensorwiseOptimizer):
        optimizer.step(finite=finite)
    else:
        optimizer.step()


def measure(makers: Makers, rounds: int) -> tuple[Clocks, int]:
    """Seconds of each step of each optimizer, in turns, by the processor and by the clock; and the number of weights."""
    optimizers, finite = {name: make() for name, make in makers.items()}, torch.tensor(True)
    count = sum(param.numel() for group in next(iter(optimizers.values())).param_groups for param in group["params"])
    seconds: Clocks = {name: {"processor": [], "clock": []} for name in makers}
    for turn in range(WARMUP + rounds):
        for name, optimizer in optimizers.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            take_step(optimizer, finite)
            if turn >= WARMUP:
                seconds[name]["processor"].append(time.process_time() - started_cpu)
                seconds[name]["clock"].append(time.perf_counter() - started)
    return seconds, count


def row(name: str, clocks: dict[str, list[float]], count: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for clock, seconds in clocks.items():
        low, middle, high = (round(1000 * second, 1) for second in statistics.quantiles(seconds, n=4))
        mean = round(1000 * statistics.mean(seconds), 1)
        found[f"{clock}_ms"] = {"lower_quartile": low, "median": middle, "upper_quartile": high, "mean": mean}
    moved = next((size for prefix, size in BYTES_MOVED.items() if name.startswith(prefix)), None)
    if moved is not None:
        for clock, seconds in clocks.items():
            found[f"gb_per_{clock}_second"] = round(moved * count / statistics.median(seconds) / 1e9, 2)
    return found


def measured(group: str) -> dict[str, Any]:
    make, rounds = GROUPS[group]
    load = os.getloadavg()[0]
    seconds, count = measure(make(), rounds)
    rows = {name: row(name, clocks, count) for name, clocks in seconds.items()}
    found = {"weights": count, "rounds": rounds, "load_before_and_after": [round(load, 1), round(os.getloadavg()[0], 1)], "steps": rows}
    if FUSED in rows:
        for clock in ("processor", "clock"):
            rates = {name: each[f"gb_per_{clock}_second"] for name, each in rows.items()}
            against = {name: round(rate / rates[FUSED], 3) for name, rate in rates.items() if name != FUSED}
            found[f"speed_per_byte_against_torch_fused_by_{clock}"] = against
    else:  # a refresh of SOAP's bases is part of the price: means, not medians
        means = {name: each["processor_ms"]["mean"] for name, each in rows.items()}
        plain = [name for name in means if name.startswith("plain")]
        found["times_faster_than_plain"] = {
            name: round(means[plain[-1] if "bf16" in name else plain[0]] / mean, 2) for name, mean in means.items() if name not in plain
        }
    return found


def trajectory(make: Callable[[Parameter], Optimizer], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """How a matrix moves in 200 steps of a noisy descent."""
    param = Parameter(tensor(SMALL, torch.float32).detach().to(dtype))
    start, optimizer, noise = param.detach().float().clone(), make(param), torch.Generator().manual_seed(1)
    for _ in range(PARITY_STEPS):
        param.grad = (param.detach().float() - 1 + torch.randn(SMALL, generator=noise)).to(dtype)
        optimizer.step()
    return param.detach().float() - start


def parity() -> dict[str, dict[str, float]]:
    """Relative distance between paths of 200 steps: of ours to that of a peer with the same settings."""
    rate = {"learning_rate": 1e-3, "weight_decay": 0.01}
    same = {"lr": 1e-3, "weight_decay": 0.01}
    fixed = {**same, "scale_parameter": False, "relative_step": False, "warmup_init": False}
    adamw = trajectory(lambda param: torch.optim.AdamW([param], **same))
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def mine(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> torch.Tensor:
        return trajectory(lambda param: ours_of(name, param, **rate, **settings), dtype)

    def theirs(module: str, name: str, **settings: Any) -> torch.Tensor:
        return trajectory(lambda param: getattr(importlib.import_module(module), name)([param], **settings))

    pairs["adamw_bf16 on float32 weights to torch AdamW"] = mine("adamw_bf16"), adamw
    pairs["adamw_bf16 on bf16 weights to torch AdamW on float32 ones"] = mine("adamw_bf16", torch.bfloat16), adamw
    pairs["adamw_bf16, kahan, to torch AdamW on float32 weights"] = mine("adamw_bf16", torch.bfloat16, rounding="kahan"), adamw
    pairs["adamw8bit to torch AdamW"] = mine("adamw8bit"), adamw
    pairs["adafactor to transformers Adafactor"] = mine("adafactor"), theirs("transformers.optimization", "Adafactor", **fixed)
    pairs["soap to plain SOAP at its first learning rate"] = mine("soap", max_precond_dim=CAP), trajectory(plain_soap)
    if has("torchao"):
        pairs["adamw8bit to torchao AdamW8bit"] = mine("adamw8bit"), theirs("torchao.optim", "AdamW8bit", **same)
    if has("bitsandbytes"):
        pairs["adamw8bit to bitsandbytes AdamW8bit"] = mine("adamw8bit"), theirs("bitsandbytes.optim", "AdamW8bit", **same)
    return {"distances": {name: round(((one - other).norm() / other.norm()).item(), 5) for name, (one, other) in pairs.items()}}


def plain_soap(param: Parameter) -> Optimizer:
    optimizer = PlainSoap([param])
    optimizer.param_groups[0]["lr"] = 1e-3
    return optimizer


def circumstances() -> dict[str, Any]:
    """When a group is measured, and with what: others of a result may be from another day."""
    packages = [name for name in ("torch", "numpy", "transformers", "torchao", "bitsandbytes", "pytorch_optimizer") if has(name)]
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"measured": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", **versions, "threads": torch.get_num_threads()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("groups", nargs="*", default=[*GROUPS, "parity"], choices=[*GROUPS, "parity"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULTS / f"optimizer_step_cpu_{datetime.now(UTC):%Y-%m-%d}.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    result = json.loads(asked.result.read_text()) if asked.result.exists() else {}
    for group in asked.groups:
        name = group if asked.threads == 1 else f"{group}, {asked.threads} threads"
        result[name] = {**circumstances(), **(parity() if group == "parity" else measured(group))}
        print(json.dumps({name: result[name]}, indent=2))
        asked.result.parent.mkdir(exist_ok=True)
        asked.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
