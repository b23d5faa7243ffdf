"""Kernels of models and their twins in plain torch, compared; `python -m tests.models.kernels.parity` prints how far apart they are.

With TRITON_INTERPRET=1 kernels run on a CPU, which has to be decided before Triton is imported: so in a process of its own.
"""

import json

import torch

from aquatint.models.kernels import geglu, geglu_triton, group_norm, group_norm_triton
from tests.models.kernels.cases import EPS, NORMS, randn

HALVES = {"short": (3, 7), "long": (2, 1029)}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
CASES = [
    *(f"norm|{name}|{dtype}|{kind}" for name in NORMS for dtype in DTYPES for kind in ("plain", "silu and shift")),
    *(f"geglu|{name}|{dtype}" for name in HALVES for dtype in DTYPES),
]


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert (expected.dtype, expected.shape) == (found.dtype, found.shape)
    expected, found = expected.double(), found.cpu().double()
    return float((expected - found).abs().max() / expected.abs().max())


def difference(case: str, device: torch.device) -> float:
    """How far a kernel on `device` is from torch on a CPU, at most of all its results."""
    kind, name, dtype, *rest = case.split("|")
    if kind == "geglu":
        return geglu_difference(HALVES[name], DTYPES[dtype], device)
    return norm_difference(name, DTYPES[dtype], rest[0], device)


def norm_difference(name: str, dtype: torch.dtype, kind: str, device: torch.device) -> float:
    shape, groups = NORMS[name]
    silu = kind != "plain"
    x, grad = ((randn(seed, *shape) * 2 + 3).to(dtype).contiguous(memory_format=torch.channels_last) for seed in (0, 1))
    weight, bias = randn(2, shape[1]).to(dtype), randn(3, shape[1]).to(dtype)
    shift = randn(4, *shape[:2]).to(dtype) if silu else None
    results = []
    for module, where in ((group_norm, "cpu"), (group_norm_triton, device)):
        put = [None if tensor is None else tensor.to(where) for tensor in (x, shift, weight, bias)]
        normed, mean, rstd = module.normalise(*put, groups, EPS, silu, dtype)
        backward = (grad.to(where), *put, mean, rstd)
        sums = module.gradient_sums(*backward, silu)
        means = group_norm.group_means(sums, put[2], mean, x.shape)
        results.append([normed, mean, rstd, sums, module.input_gradient(*backward, means, silu)])
    return max(map(distance, *results))


def geglu_difference(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> float:
    rows, size = shape
    projected, grad = randn(0, rows, 2 * size).to(dtype) * 2, randn(1, rows, size).to(dtype)
    expected = [geglu.gate(projected), *geglu.gate_gradient(grad, projected)]
    found = [geglu_triton.gate(projected.to(device)), *geglu_triton.gate_gradient(grad.to(device), projected.to(device))]
    return max(map(distance, expected, found))


def refusals(device: torch.device) -> list[str]:
    """What kernels say to memory in another order."""
    said = []
    x, flat = torch.zeros(1, 4, 3, 2, device=device), torch.zeros(4, 6, device=device).t()
    for call in (
        lambda: group_norm_triton.normalise(x, None, x[0, :, 0, 0], x[0, :, 0, 0], 2, EPS, False, x.dtype),
        lambda: geglu_triton.gate(flat),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def main() -> None:
    cpu = torch.device("cpu")
    print(json.dumps({**{case: difference(case, cpu) for case in CASES}, "refusals": refusals(cpu)}))


if __name__ == "__main__":
    main()
