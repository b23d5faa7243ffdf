"""A kernel and plain torch give the same bits: interpreted on a CPU, compiled for a GPU, and run on one where there is one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from aquatint.optim import adafactor_kernels, adamw_bf16, kernels
from aquatint.optim.adafactor_kernels import COLUMNS, TILE
from aquatint.optim.formula import Coefficients
from tests.optim.parity import CASES, differences, optimizer_differences, refusals

ROOT = Path(__file__).parents[2]
CONTIGUOUS_ONLY = ["a kernel steps contiguous tensors only"]
BF16, FLOAT32, UINT8, BOOL = "*bf16", "*fp32", "*u8", "*i1"
KERNELS = {  # pointers; loads and stores of 8 weights, of 16 bytes each or what there is
    "bf16": (kernels._adamw_kernel, dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq"), BF16), 4, 3),
    "kahan": (kernels._adamw_kernel, dict.fromkeys(("param", "grad", "exp_avg", "exp_avg_sq", "compensation"), BF16), 5, 4),
    "8bit": (
        kernels._adamw8bit_kernel,
        {
            "param": BF16, "grad": BF16, "exp_avg_code": UINT8, "exp_avg_scale": FLOAT32, "exp_avg_sq_code": UINT8,
            "exp_avg_sq_scale": FLOAT32, "signed_value": FLOAT32, "signed_border": FLOAT32, "signed_first": UINT8,
            "value": FLOAT32, "border": FLOAT32, "first": UINT8,
        },
        4,
        3,
    ),
}  # fmt: skip
THREADS = 4 * 32  # of a program
FACTORS = {"grad": BF16, "left": FLOAT32, "right": FLOAT32}
PASSES = {  # pointers; how often a tile is loaded and stored
    "squares": (adafactor_kernels._squares_kernel, {"grad": BF16, "row_parts": FLOAT32, "col_parts": FLOAT32}, 1, 0),
    "update_squares": (adafactor_kernels._update_squares_kernel, {**FACTORS, "parts": FLOAT32}, 1, 0),
    "update": (adafactor_kernels._update_kernel, {**FACTORS, "weights": BF16}, 2, 1),
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-m", "tests.optim.parity"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_interpreted_gives_the_bits_of_plain_torch(interpreted, case):
    assert interpreted[case] == []


def test_tensors_that_are_not_contiguous_are_refused(interpreted):
    assert interpreted["refusals"] == refusals(torch.device("cpu")) == CONTIGUOUS_ONLY


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_it_is_one_pass_and_rounds_after_every_operation(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly = compiled(*KERNELS[name][:2])
    assert {"div.rn.f32", "sqrt.rn.f32", "mul.rn.f32"} <= operations_of(assembly)
    assert vectors_of(assembly) == list(KERNELS[name][2:])


@pytest.mark.parametrize("name", PASSES)
def test_compiled_adafactor_reads_a_tile_once_eight_neighbours_at_a_time(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, pointers, reads, writes = PASSES[name]
    assembly = compiled(kernel, pointers)
    assert "mul.rn.f32" in operations_of(assembly)
    eights = [len(re.findall(rf"{kind}\.global\S*\.v4\.b32", assembly)) for kind in ("ld", "st")]
    assert eights == [reads * TILE // THREADS // 8, writes * TILE // THREADS // 8]


def operations_of(assembly: str) -> set[str]:
    """Those on float32 in PTX, of which none may be inexact or two at once."""
    operations = set(re.findall(r"\b\w+\.[\w.]*f32", assembly))
    assert not [name for name in operations if name.startswith(("fma", "mad"))]
    assert not [name for name in operations if "approx" in name or "full" in name or "ftz" in name]
    return operations


def vectors_of(assembly: str) -> list[int]:
    """How many loads and stores in PTX are of several numbers."""
    return [len(re.findall(rf"{kind}\.global\S*\.v[24]\.b32", assembly)) for kind in ("ld", "st")]


def compiled(kernel, pointers: dict[str, str]) -> str:
    """The PTX for an RTX 4090 of a kernel over tensors of a multiple of 16 elements, or whose rows are."""
    places = ("count", "start", "rows", "width", "first", "x0", "y0", "z0")
    numbers = {**dict.fromkeys(places, "i32"), **dict.fromkeys(Coefficients._fields, "fp32")}
    types = {**numbers, **pointers, "finite": BOOL}
    constants = {"size": kernels.ELEMENTS, "num_rows": TILE // COLUMNS, "num_columns": COLUMNS}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): constants.get(name) for name in names if name not in types},
        {(names.index(name),): [["tt.divisibility", 16]] for name in names if name in pointers or name in ("count", "rows", "width")},
    )
    return triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"enable_fp_fusion": False}).asm["ptx"]


def test_plain_torch_is_taken_where_there_is_no_gpu():
    assert not adamw_bf16.has_kernels(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_on_a_gpu_gives_the_bits_of_plain_torch_on_a_cpu(case):
    assert adamw_bf16.has_kernels(torch.device("cuda"))
    assert differences(case, torch.device("cuda")) == []


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("AdamW")])
def test_plain_torch_on_a_gpu_gives_them_too(case):
    assert optimizer_differences(*case.split(" ", 1), torch.device("cuda"), kernel="none") == []
