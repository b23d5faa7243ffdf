"""An optimizer's update as one pass over memory on a CPU: `adamw.cpp`, which a C++ compiler makes into vector instructions of this CPU.

Each function does what the one of its name in `adamw_bf16` or `adamw8bit` does, bit for bit. It is compiled anew in each process that
uses it, which takes a second and leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch import Tensor

from aquatint.errors import UsageError
from aquatint.optim.blockwise import code_table, codebook
from aquatint.optim.formula import coefficients
from aquatint.optim.rounding import Key, key_constants
from aquatint.optim.sizes import BLOCK
from aquatint.optim.tensorwise import State

SOURCE = Path(__file__).with_name("adamw.cpp")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC",
    "-ffp-contract=off",  # a product that is added is rounded before it is, as elsewhere
    "-fno-math-errno", "-fno-trapping-math",  # else a root is not a vector instruction; both change no result
)  # fmt: skip
NATIVE = {"x86_64": ("-march=native", "-mprefer-vector-width=512")}  # by the machine's name; of another, -mcpu=native
THREADS = {"Linux": ("-fopenmp",)}  # by the system's name: elsewhere compilers come without it, and one thread does everything


def compiler() -> str | None:
    """The C++ compiler: g++, or what the environment variable CXX names."""
    name = os.environ.get("CXX", "g++")
    return name if which(name) else None


@cache
def library() -> ctypes.CDLL:
    """The compiled source. Raises UsageError if there is no compiler, or what it says if it fails."""
    name, hint = compiler(), 'set `optimizer.kernel = "none"`: slower, the same bits'
    if name is None:
        hint = f"install g++, or name another in the environment variable CXX, or {hint}"
        raise UsageError('`optimizer.kernel = "compiled"` needs a C++ compiler, and there is none', hint=hint)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = Path(folder) / "adamw.so"
        own = (*NATIVE.get(platform.machine(), ("-mcpu=native",)), *THREADS.get(platform.system(), ()))
        command = [name, *FLAGS, *own, str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            if done.returncode == 0:
                return ctypes.CDLL(str(built))
            said = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
        except OSError as error:  # it needs a library, of OpenMP say, that is not here
            said = str(error)
    raise UsageError(f"the C++ compiler {name} fails: {said}", hint=f"name another in the environment variable CXX, or {hint}")


def adamw_(
    grad: Tensor,
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    compensation: Tensor | None = None,
    *,
    key: Key,
    start: int = 0,
    finite: Tensor | None = None,
    **settings: Any,
) -> bool:
    """As `adamw_bf16.adamw_`, of contiguous vectors. Returns whether it was done: not if they are float32, or if there may be no step."""
    tensors = [grad, param, exp_avg, exp_avg_sq, *([] if compensation is None else [compensation])]
    if finite is not None or any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return False
    pointers = [_pointer(tensor) for tensor in tensors] + [None] * (5 - len(tensors))
    library().adamw(*_numbers(key, settings), *map(ctypes.c_int64, (start, param.numel())), torch.get_num_threads(), *pointers)
    return True


def adamw8bit_(
    param: Tensor, grad: Tensor, state: State, *, key: Key, start: int = 0, finite: Tensor | None = None, **settings: Any
) -> bool:
    """As `adamw8bit.adamw8bit_`, of whole contiguous vectors. Returns whether it was done: not if there may be no step."""
    if finite is not None or param.dtype not in (torch.float32, torch.bfloat16) or grad.dtype != param.dtype:
        return False
    moments = []
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        tables = codebook(signed, param.device).value, code_table(signed, param.device)
        moments.append((ctypes.c_void_p * 4)(*(t.data_ptr() for t in (state[f"{name}_code"], state[f"{name}_scale"], *tables))))
    places = map(ctypes.c_int64, (start, param.numel() // BLOCK))
    weights = int(param.dtype == torch.bfloat16), _pointer(grad), _pointer(param)
    library().adamw8bit(*_numbers(key, settings), *places, torch.get_num_threads(), *weights, *moments)
    return True


def round_rows_(targets: Sequence[Tensor], results: Sequence[Tensor], key: Key, finite: Tensor | None = None) -> bool:
    """As `soap.round_rows_`. Returns whether it was done: not if targets are no contiguous bfloat16, or if there may be no step."""
    are_plain = all(target.dtype == torch.bfloat16 and target.is_contiguous() for target in targets)
    if finite is not None or not are_plain or not all(result.is_contiguous() for result in results):
        return False
    pointers = [(ctypes.c_void_p * 3)(*(tensor.data_ptr() for tensor in tensors)) for tensors in (results, targets)]
    library().round_three(_constants(key), ctypes.c_int64(targets[0].numel()), torch.get_num_threads(), *pointers)
    return True


def _numbers(key: Key, settings: dict[str, Any]) -> Iterator[Any]:
    """The step's coefficients and the key's constants."""
    yield (ctypes.c_float * 7)(*coefficients(**settings))
    yield _constants(key)


def _constants(key: Key) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * 3)(*key_constants(key))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
