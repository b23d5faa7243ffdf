"""Adafactor with a fixed learning rate and no momentum: the second moment of a matrix is kept as its row and column means.

For SDXL's UNet that state is 18 MiB, where AdamW's is 20 GB. A convolution counts as the matrix (O, I kh kw): factored
over its 3 x 3 kernel, as is common, its state would be fifty times as large and its approximation poor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aquatint.optim.adamw_bf16 import Kernel, has_kernels
from aquatint.optim.flat import row_pieces
from aquatint.optim.rounding import Key, copy_stochastic_, draw_rows, exact, write_
from aquatint.optim.sharded import Place, local, local_grad, place_of
from aquatint.optim.tensorwise import State, TensorwiseOptimizer, Unit

EPS = 1e-30  # epsilon_1 of the paper: keeps the root of a zero gradient's second moment from being 0


class Factors(NamedTuple):
    """1 / sqrt(V) of a matrix (O, I) as a column (O, 1) times a row (I,)."""

    left: Tensor
    right: Tensor


def second_moment_decay(step: int, decay_power: float) -> float:
    """1 - t^-c with steps from 1: the first one takes its own gradient alone (arXiv 1804.04235, section 7)."""
    return 1 - math.pow(step, -decay_power)


def factored(
    grad: Tensor, row: Tensor, col: Tensor, decay: float, place: Place | None = None, passes: Passes | None = None
) -> tuple[Factors, Tensor, Tensor]:
    """1 / sqrt(V) of a matrix (O, I), or of those of its rows at `place`, and the new row (O,) and column (I,) means of g^2; all float32.

    V = row col^T / mean(row) (arXiv 1804.04235, algorithm 4, with means for sums).
    """
    place = place or place_of(grad)
    row_mean, col_mean = mean_squares(grad, place, (passes or PLAIN).squares)
    row = decay * row + (1 - decay) * row_mean
    col = decay * col + (1 - decay) * col_mean
    return Factors((row / (place.total(row.sum()) / place.shape[0])).rsqrt().unsqueeze(1), col.rsqrt()), row, col


def mean_squares(grad: Tensor, place: Place, squares: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Means of g^2 + EPS over each row that is here and over each column of the whole matrix (O, I): (O,) and (I,), float32."""
    row, col = squares(grad)
    return row / grad.shape[1] + EPS, place.total(col) / place.shape[0] + EPS


def squares(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of g^2 over each row and each column of a matrix (O, I): (O,) and (I,), float32."""
    row = torch.empty(grad.shape[0], dtype=torch.float32, device=grad.device)
    col = torch.zeros(grad.shape[1], dtype=torch.float32, device=grad.device)
    for piece in row_pieces(grad):
        square = exact(grad[piece]).square_()
        row[piece] = square.sum(dim=1)
        col += square.sum(dim=0)
    return row, col


def unfactored(grad: Tensor, exp_avg_sq: Tensor, decay: float) -> tuple[Factors, Tensor]:
    """1 / sqrt(V) of a vector, taken as a matrix (O, 1), and its new V; all float32 (arXiv 1804.04235, algorithm 5)."""
    exp_avg_sq = decay * exp_avg_sq + (1 - decay) * (grad.float().square() + EPS)
    return Factors(exp_avg_sq.rsqrt().unsqueeze(1), torch.ones_like(exp_avg_sq[:1])), exp_avg_sq


def clip_scale(grad: Tensor, factors: Factors, threshold: float, place: Place | None = None, passes: Passes | None = None) -> Tensor:
    """What brings the root mean square of the update g / sqrt(V) down to `threshold`; 1 if it is below (arXiv 1804.04235, section 6)."""
    place = place or place_of(grad)
    rms = (place.total((passes or PLAIN).update_squares(grad, *factors)) / place.shape.numel()).sqrt()
    return 1 / (rms / threshold).clamp(min=1.0)


def update_squares(grad: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum of (g left right)^2 over a matrix (O, I), float32, for `Factors`."""
    left, right = left.square().squeeze(1), right.square()
    return torch.stack([torch.dot(left[piece], exact(grad[piece]).square_() @ right) for piece in row_pieces(grad)]).sum()


def update_(
    weights: Tensor, grad: Tensor, left: Tensor, right: Tensor, decay: float, key: Key, first: int = 0, finite: Tensor | None = None
) -> None:
    """p = decay p - g left right of a matrix (O, I), if `finite`, rounded as `copy_stochastic_` does.

    Both products and the difference are rounded on their own. The random bits are those of `draw_rows`, the matrix's rows being those
    from `first` on.
    """
    for piece in row_pieces(grad):
        value = exact(weights[piece]).mul_(decay)
        value.sub_(exact(grad[piece]).mul_(left[piece]).mul_(right))
        copy_stochastic_(weights[piece], value, draw_rows(weights[piece], key, first + piece.start), finite)


class Passes(NamedTuple):
    """What a step does to all elements of a matrix: `squares`, `update_squares` and `update_`, or what gives the same."""

    squares: Callable[[Tensor], tuple[Tensor, Tensor]]
    update_squares: Callable[[Tensor, Tensor, Tensor], Tensor]
    update_: Callable[..., None]


PLAIN = Passes(squares, update_squares, update_)


def passes_for(kernel: Kernel, weight: Tensor) -> Passes:
    """Those in Triton, for a GPU that has them and unless `kernel` is `none`, or those in plain torch."""
    if kernel == "none" or not has_kernels(weight.device):
        return PLAIN
    from aquatint.optim import adafactor_kernels as kernels

    return Passes(kernels.squares, kernels.update_squares, kernels.update_)


class Adafactor(TensorwiseOptimizer):
    """Adafactor over bfloat16 (stochastically rounded) or float32 weights; its state is always float32.

    `lr` is the size of a step, neither scaled by the size of the weights nor decayed. `seed` keys the rounding.
    It is part of the parameter groups, and so of the state dict. `kernel` is as `passes_for` has it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
        decay_power: float = 0.8,
        kernel: Kernel = "auto",
        seed: int,
    ) -> None:
        self.kernel = kernel
        defaults = {"lr": lr, "weight_decay": weight_decay, "clip_threshold": clip_threshold, "decay_power": decay_power}
        super().__init__(params, {**defaults, "seed": seed})

    def kind(self, param: Tensor) -> Hashable:
        """Each on its own: an update is clipped as a whole."""
        return id(param)

    def steps_part(self, param: Tensor) -> bool:
        """But for weights so small that a process may have nothing of them."""
        return place_of(param).is_everywhere

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        """Empty second moments, float32: row and column means of a matrix (O, I) or convolution (O, I, kh, kw)."""
        zeros, param = partial(torch.zeros, dtype=torch.float32, device=param.device), local(param)
        if param.dim() < 2:
            return {"exp_avg_sq": zeros(param.numel())}
        rows = param.shape[0]
        return {"exp_avg_sq_row": zeros(rows), "exp_avg_sq_col": zeros(param.numel() // rows)}

    def advance(self, params: Sequence[Tensor], unit: Unit, step: int, finite: Tensor | None) -> None:
        for param in params:
            if param.grad is not None:
                part, grad, place = local(param), local_grad(param), place_of(param)
                passes = passes_for(self.kernel, part)
                adafactor_(part, grad, self.state[param], self.key(unit, step), unit.group, step, finite, place, passes)


def adafactor_(
    param: Tensor,
    grad: Tensor,
    state: State,
    key: Key,
    group: dict[str, Any],
    step: int,
    finite: Tensor | None = None,
    place: Place | None = None,
    passes: Passes = PLAIN,
) -> None:
    """One step of a weight, or of the part of one at `place`, in place, if `finite`; rounding as `copy_stochastic_` does."""
    place = place or place_of(param)
    second_decay = second_moment_decay(step, group["decay_power"])
    new: State
    if param.dim() < 2:
        weights, grad = param.view(-1, 1), grad.view(-1, 1)
        factors, exp_avg_sq = unfactored(grad[:, 0], state["exp_avg_sq"], second_decay)
        new = {"exp_avg_sq": exp_avg_sq}
    else:
        weights, grad = param.flatten(1), grad.flatten(1)
        factors, row, col = factored(grad, state["exp_avg_sq_row"], state["exp_avg_sq_col"], second_decay, place, passes)
        new = {"exp_avg_sq_row": row, "exp_avg_sq_col": col}
    scale = group["lr"] * clip_scale(grad, factors, group["clip_threshold"], place, passes)
    decay, first = 1 - group["lr"] * group["weight_decay"], place.start // weights.shape[1]
    passes.update_(weights, grad, factors.left, factors.right * scale, decay, key, first, finite)
    if weights.data_ptr() != param.data_ptr():
        param.copy_(weights.view(param.shape))
    for name, second_moment in new.items():
        write_(state[name], second_moment, finite)
