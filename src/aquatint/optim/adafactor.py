"""Adafactor with a fixed learning rate and no momentum: the second moment of a matrix is kept as its row and column means.

For SDXL's UNet that state is 18 MiB, where AdamW's is 20 GB. A convolution counts as the matrix (O, I kh kw): factored
over its 3 x 3 kernel, as is common, its state would be fifty times as large and its approximation poor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aquatint.optim.adamw_bf16 import Kernel, has_kernels
from aquatint.optim.flat import join, row_pieces, spread_
from aquatint.optim.rounding import Key, copy_stochastic_, draw_for, draw_rows, exact, write_
from aquatint.optim.sharded import Place, local, local_grad, place_of, whole_norms
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


def unfactored(grad: Tensor, exp_avg_sq: Tensor, decay: float) -> Tensor:
    """The new V of a vector, float32 (arXiv 1804.04235, algorithm 5)."""
    return decay * exp_avg_sq + (1 - decay) * (grad.float().square() + EPS)


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
        """Matrices each on their own."""
        return super().kind(param) if param.dim() < 2 else id(param)

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
        key, states = self.key(unit, step), [self.state[param] for param in params]
        if params[0].dim() < 2:
            vectors_(params, [state["exp_avg_sq"] for state in states], key, unit.group, step, finite)
            return
        for param, state in zip(params, states, strict=True):
            part = local(param)
            passes = passes_for(self.kernel, part)
            adafactor_(part, local_grad(param), state, key, unit.group, step, finite, place_of(param), passes)


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
    """One step of a matrix, or of the part of one at `place`, in place, if `finite`; rounding as `copy_stochastic_` does."""
    place = place or place_of(param)
    weights, grad = param.flatten(1), grad.flatten(1)
    second_decay = second_moment_decay(step, group["decay_power"])
    factors, row, col = factored(grad, state["exp_avg_sq_row"], state["exp_avg_sq_col"], second_decay, place, passes)
    scale = group["lr"] * clip_scale(grad, factors, group["clip_threshold"], place, passes)
    decay, first = 1 - group["lr"] * group["weight_decay"], place.start // weights.shape[1]
    passes.update_(weights, grad, factors.left, factors.right * scale, decay, key, first, finite)
    if weights.data_ptr() != param.data_ptr():
        param.copy_(weights.view(param.shape))
    write_(state["exp_avg_sq_row"], row, finite)
    write_(state["exp_avg_sq_col"], col, finite)


def vectors_(
    params: Sequence[Tensor], second_moments: Sequence[Tensor], key: Key, group: dict[str, Any], step: int, finite: Tensor | None
) -> None:
    """One step of vectors at once, or of this process's parts of them, in place, if `finite`. Each update is clipped on its own.

    The random bits are those of places among all of them.
    """
    parts, places = [local(param) for param in params], [place_of(param) for param in params]
    weights, old = join(parts), join(second_moments)
    grad = join([local_grad(param) for param in params]).float()
    new = unfactored(grad, old, second_moment_decay(step, group["decay_power"]))
    update = grad * new.rsqrt()
    pieces = torch.split(update, [part.numel() for part in parts])
    norms = whole_norms(torch._foreach_norm(pieces), params)
    scales = torch._foreach_mul(norms, [1 / (group["clip_threshold"] * math.sqrt(place.shape.numel())) for place in places])
    torch._foreach_clamp_min_(scales, 1.0)
    torch._foreach_reciprocal_(scales)
    torch._foreach_mul_(pieces, torch._foreach_mul(scales, group["lr"]))
    value = exact(weights).mul_(1 - group["lr"] * group["weight_decay"]).sub_(update)
    copy_stochastic_(weights, value, _bits_for(weights, parts, places, key), finite)
    write_(old, new, finite)
    spread_(weights, parts)
    spread_(old, second_moments)


def _bits_for(weights: Tensor, parts: Sequence[Tensor], places: Sequence[Place], key: Key) -> Tensor:
    """Random numbers (1, n) for vectors one behind the other, `weights`; of a part, those at its place in the whole."""
    if all(place.group is None for place in places):
        return draw_for(weights, key, rows=1)
    firsts = accumulate((place.shape.numel() for place in places), initial=0)
    drawn = [draw_for(part, key, first + place.start, rows=1) for part, place, first in zip(parts, places, firsts, strict=False)]
    return torch.cat(drawn, dim=1)
