"""Kernels of models give what their twins in plain torch do: interpreted on a CPU, compiled for a GPU, and run where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aquatint.models.kernels import geglu_triton, group_norm_triton
from aquatint.models.kernels.precision import FUSED
from tests.models.kernels.parity import CASES, difference, refusals

ROOT = Path(__file__).parents[3]
TOLERANCES = {"float32": 2e-6, "bf16": 8e-3}  # of the largest value; the interpreter truncates to bf16, where GPUs round
REFUSALS = ["a kernel takes pictures whose channels lie last", "a kernel takes contiguous tensors only"]
BF16, FLOAT32 = "*bf16", "*fp32"
STATISTICS = {"mean": FLOAT32, "rstd": FLOAT32}
INPUTS = dict.fromkeys(("x", "shift", "weight", "bias"), BF16)
KERNELS = {
    "moments": (group_norm_triton._moments_kernel, {"x": BF16, "shift": BF16, "moments": FLOAT32}, {}),
    "statistics": (group_norm_triton._statistics_kernel, {"moments": FLOAT32, **STATISTICS}, {"tiles": 64, "width": 32}),
    "normalise": (group_norm_triton._normalise_kernel, {**INPUTS, **STATISTICS, "result": BF16}, {"silu": True}),
    "sums": (group_norm_triton._sums_kernel, {"grad": BF16, **INPUTS, **STATISTICS, "sums": FLOAT32}, {"silu": True}),
    "input gradient": (
        group_norm_triton._input_gradient_kernel,
        {"grad": BF16, **INPUTS, **STATISTICS, "means": FLOAT32, "result": BF16},
        {"silu": True},
    ),
    "gate": (geglu_triton._gate_kernel, {"projected": BF16, "result": BF16}, {}),
    "gate gradient": (
        geglu_triton._gate_gradient_kernel,
        {"grad": BF16, "projected": BF16, "of_projected": BF16, "result": BF16},
        {},
    ),
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, float]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.models.kernels.parity"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_interpreted_gives_what_plain_torch_does(interpreted, case):
    assert interpreted[case] < TOLERANCES[case.split("|")[2]]


@pytest.mark.long
def test_memory_in_another_order_is_refused(interpreted):
    assert interpreted["refusals"] == refusals(torch.device("cpu")) == REFUSALS


@pytest.mark.long
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_it_reads_what_lies_together_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, pointers, constants = KERNELS[name]
    numbers = {**dict.fromkeys(("places", "channels", "groups", "size"), "i32"), "eps": "fp32"}
    names, types = kernel.arg_names, {**numbers, **pointers}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): constants[name] for name in names if name not in types},
        {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in pointers or name in ("channels", "size")},
    )
    assembly = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=FUSED).asm["ptx"]
    if name != "statistics":  # which reads a few numbers of each channel
        assert "ld.global" in assembly
        assert ".v4.b32" in assembly or ".v2.b32" in assembly


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_on_a_gpu_gives_what_plain_torch_does_on_a_cpu(case):
    assert difference(case, torch.device("cuda")) < TOLERANCES[case.split("|")[2]]
