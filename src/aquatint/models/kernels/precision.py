"""In which numbers an operation computes and hands on its result."""

from __future__ import annotations

import torch
from torch import Tensor

FUSED = {"enable_fp_fusion": True}  # for Triton: a product and a sum are rounded once, together


def result_dtype(x: Tensor) -> torch.dtype:
    """That of autocast where it is on: the product or convolution that comes next would round to it anyway. Otherwise that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def math_dtype(x: Tensor) -> torch.dtype:
    """float32 for bf16 and float32; float64 stays."""
    return torch.promote_types(x.dtype, torch.float32)
