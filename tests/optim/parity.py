"""Updates by a kernel and by plain torch, compared bit for bit; `python -m tests.optim.parity` prints where they differ.

With TRITON_INTERPRET=1 kernels run on a CPU, which has to be decided before Triton is imported: so in a process of its own.
"""

import json
from itertools import product
from unittest.mock import patch

import torch
from torch.nn import Parameter

from aquatint.optim import adafactor, adafactor_kernels, adamw8bit, adamw_bf16, kernels
from aquatint.optim.sizes import BLOCK

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
STEPS, LEFT_OUT = 3, 2
KEY = (2**31 - 5, 2**32 - 7)
SHAPES = [(7,), (5, 3), (32, 16, 3, 3), (31,)]
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "float32 moments": (torch.bfloat16, torch.float32),
}
CASES = [
    *(f"adamw {dtypes} {count}" for dtypes, count in product(DTYPES, (1, 2049))),
    "kahan bf16 1025", "adamw8bit bf16", "adamw8bit float32",
    "AdamWBF16 bf16", "AdamWBF16 kahan", "AdamW8bit bf16",
    *(f"adafactor {dtypes} {rows}x{width}" for dtypes in ("bf16", "float32") for rows, width in ((7, 5), (130, 300), (1, 40), (9000, 1))),
    "Adafactor bf16", "Adafactor float32",
]  # fmt: skip
CLOSE = 1e-6  # sums in another order


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(step: int, *shape: int) -> torch.Tensor:
    """Over six decades; not a number at the step that is left out."""
    bits = torch.Generator().manual_seed(100 + step)
    values = torch.randn(*shape, generator=bits) * 10 ** (-6 * torch.rand(*shape, generator=bits))
    return values * (float("nan") if step == LEFT_OUT else 1.0)


def finite(step: int, device: torch.device) -> torch.Tensor | None:
    """The first step is not asked whether it is."""
    return None if step == 1 else torch.tensor(step != LEFT_OUT, device=device)


def differing(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in expected if not torch.equal(expected[name], found[name].cpu())]


def differences(case: str, device: torch.device) -> list[str]:
    """Names of what a kernel on `device` makes otherwise than torch on a CPU."""
    name, *rest = case.split(" ", 1)
    if name in ("adamw", "kahan"):
        kind, count = rest[0].rsplit(" ", 1)
        return adamw_differences(*DTYPES[kind], int(count), name == "kahan", device)
    if name == "adamw8bit":
        return adamw8bit_differences(DTYPES[rest[0]][0], device)
    if name == "adafactor":
        kind, shape = rest[0].split(" ")
        return adafactor_differences(DTYPES[kind][0], *map(int, shape.split("x")), device)
    if name == "Adafactor":
        return adafactor_run_differences(DTYPES[rest[0]][0], device)
    return optimizer_differences(name, rest[0], device)


def adamw_differences(dtype: torch.dtype, moments: torch.dtype, count: int, is_kahan: bool, device: torch.device) -> list[str]:
    names = ["param", "exp_avg", "exp_avg_sq", "compensation"][: 4 if is_kahan else 3]
    zeros = {name: torch.zeros(count, dtype=moments if "exp" in name else dtype) for name in names}
    expected = {**zeros, "param": randn(0, count).to(dtype)}
    found = {key: value.to(device, copy=True) for key, value in expected.items()}
    for step in range(1, STEPS + 1):
        grad = gradient(step, count).to(dtype)
        for update, tensors, where in ((adamw_bf16.adamw_, expected, torch.device("cpu")), (kernels.adamw_, found, device)):
            update(grad.to(where), *tensors.values(), key=KEY, start=3, finite=finite(step, where), step=step, **SETTINGS)
    return differing(expected, found)


def adamw8bit_differences(dtype: torch.dtype, device: torch.device) -> list[str]:
    count = 17 * BLOCK
    param = Parameter(randn(0, count).to(dtype))
    expected = {"param": param.detach(), **adamw8bit.AdamW8bit([param], seed=0).initial_state(param, {})}
    found = {key: value.to(device, copy=True) for key, value in expected.items()}
    for step in range(1, STEPS + 1):
        grad = gradient(step, count).to(dtype)
        grad[BLOCK : 2 * BLOCK] = 0
        for update, tensors, where in ((adamw8bit.adamw8bit_, expected, torch.device("cpu")), (kernels.adamw8bit_, found, device)):
            state = {key: value for key, value in tensors.items() if key != "param"}
            for piece in (slice(0, 5 * BLOCK), slice(5 * BLOCK, count)):
                update(tensors["param"], grad.to(where), state, piece, key=KEY, finite=finite(step, where), step=step, **SETTINGS)
    return differing(expected, found)


def adafactor_differences(dtype: torch.dtype, rows: int, width: int, device: torch.device) -> list[str]:
    """Of the passes over a matrix: sums are close, an update has the same bits."""
    param, grad = randn(0, rows, width).to(dtype), gradient(1, rows, width).to(dtype)
    factors = adafactor.Factors(randn(1, rows, 1).exp(), randn(2, width).exp())
    there = adafactor.Factors(*(factor.to(device) for factor in factors))
    sums, found = adafactor.squares(grad), adafactor_kernels.squares(grad.to(device))
    far = [f"squares {dim}" for dim in (0, 1) if not torch.allclose(found[dim].cpu(), sums[dim], rtol=CLOSE)]
    total, found_total = adafactor.update_squares(grad, *factors), adafactor_kernels.update_squares(grad.to(device), *there)
    far += [] if torch.allclose(found_total.cpu(), total, rtol=CLOSE) else ["update_squares"]
    results = []
    for module, where, own in ((adafactor, torch.device("cpu"), factors), (adafactor_kernels, device, there)):
        weights = param.to(where, copy=True)
        for step in range(1, STEPS + 1):
            module.update_(weights, gradient(step, rows, width).to(where, dtype), *own, 0.99, KEY, 3, finite(step, where))
        results.append({"update_": weights})
    return far + differing(*results)


def adafactor_run_differences(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Of a whole optimizer: weights may be a rounding apart where sums are."""
    results = []
    for kernel, where in (("none", torch.device("cpu")), ("auto", device)):
        params = [Parameter(randn(index, *shape).to(where, dtype)) for index, shape in enumerate(SHAPES)]
        params[2].data = params[2].data.to(memory_format=torch.channels_last)
        optimizer = adafactor.Adafactor(params, lr=1e-2, weight_decay=0.1, kernel=kernel, seed=0)
        for step in range(1, STEPS + 1):
            for index, param in enumerate(params):
                param.grad = gradient(step + 10 * index, *param.shape).nan_to_num(0.5).to(where, dtype)
            optimizer.step(finite=finite(step, where))
        results.append([*params, *(value for param in params for name, value in optimizer.state[param].items())])
    bits = {torch.bfloat16: 1 / 128, torch.float32: CLOSE}
    pairs = enumerate(zip(*results, strict=True))
    return [str(index) for index, (one, other) in pairs if not torch.allclose(other.cpu(), one, rtol=bits.get(one.dtype, CLOSE))]


def optimizer_differences(name: str, kind: str, device: torch.device, kernel: str = "auto") -> list[str]:
    """Of whole optimizers: several tensors, one of them in another memory format."""
    settings = {**SETTINGS, **({"rounding": "kahan"} if kind == "kahan" else {})}
    results = []
    for kernel_, where in (("none", torch.device("cpu")), (kernel, device)):
        params = [Parameter(randn(index, *shape).to(where, torch.bfloat16)) for index, shape in enumerate(SHAPES)]
        params[2].data = params[2].data.to(memory_format=torch.channels_last)
        module = adamw8bit if name == "AdamW8bit" else adamw_bf16
        optimizer = getattr(module, name)(params, **settings, kernel=kernel_, seed=0)
        for step in range(1, STEPS + 1):
            for index, param in enumerate(params):
                param.grad = gradient(step + 10 * index, *param.shape).nan_to_num(0.5).to(where, torch.bfloat16)
            optimizer.step(finite=finite(step, where))
        state = {f"{index}.{key}": tensor for index, param in enumerate(params) for key, tensor in optimizer.state[param].items()}
        results.append({**{f"{index}": param.detach() for index, param in enumerate(params)}, **state})
    return differing(*results)


def refusals(device: torch.device) -> list[str]:
    """What a kernel says to tensors that are not contiguous."""
    param, other = torch.zeros(4, 8, device=device).T, torch.zeros(8, 4, device=device)
    try:
        kernels.adamw_(other, param, other, other, key=KEY, step=1, **SETTINGS)
    except ValueError as error:
        return [str(error)]
    return []


def main() -> None:
    cpu = torch.device("cpu")
    with (
        patch.object(adamw_bf16, "has_kernels", lambda device: True),
        patch.object(adamw8bit, "has_kernels", lambda device: True),
        patch.object(adafactor, "has_kernels", lambda device: True),
    ):
        found = {case: differences(case, cpu) for case in CASES}
    print(json.dumps({**found, "refusals": refusals(cpu)}))


if __name__ == "__main__":
    main()
