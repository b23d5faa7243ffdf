"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321, algorithm 3).

A matrix (O, I) has two Gram matrices, means of G G^T and G^T G, and their eigenbases. Its gradient is rotated into them, Adam is done
there, and the step is rotated back. The bases are refreshed every few steps by one power iteration and a QR factorisation, each tensor at
steps of its own, so that no step has to refresh them all. A convolution is the matrix (O, I kh kw); a side longer than
`max_precond_dim` is not rotated, and vectors get AdamW. Gram matrices and bases are float32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aquatint.optim import compiled
from aquatint.optim.adamw_bf16 import ADAMW_SETTINGS, Kernel, adamw_, chosen_kernel
from aquatint.optim.flat import join, pieces, row_pieces, spread_
from aquatint.optim.rounding import Key, copy_stochastic_, draw_for, exact, write_
from aquatint.optim.sizes import preconditioned_dims
from aquatint.optim.tensorwise import State, TensorwiseOptimizer, Unit

SIDES = ("left", "right")
GRAM_BLOCKS = 4  # more save little and make the products small

Bases = tuple[Tensor | None, Tensor | None]


def rotate(matrix: Tensor, bases: Bases) -> Tensor:
    """Q_L^T M Q_R, for a basis whose columns are the new axes; None leaves its side as it is."""
    left, right = bases
    matrix = matrix if left is None else left.T @ matrix
    return matrix if right is None else matrix @ right


def rotate_back(matrix: Tensor, bases: Bases) -> Tensor:
    """Q_L M Q_R^T."""
    left, right = bases
    matrix = matrix if left is None else left @ matrix
    return matrix if right is None else matrix @ right.T


def soap(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    bases: Bases,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """New param, exp_avg and exp_avg_sq of a matrix, float32; both moments are in the rotated basis (step from 1).

    g' = Q_L^T g Q_R;  m = b1 m + (1 - b1) g';  v = b2 v + (1 - b2) g'^2;
    p = (1 - lr wd) p - lr Q_L (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) Q_R^T
    """
    beta1, beta2 = betas
    rotated = rotate(grad.float(), bases)
    firsts, seconds = torch.empty_like(rotated), torch.empty_like(rotated)
    directions = torch.empty_like(rotated) if rotated is grad else rotated
    for piece in row_pieces(rotated):
        first = torch.lerp(exp_avg[piece].float(), rotated[piece], 1 - beta1, out=firsts[piece])
        second = torch.mul(exp_avg_sq[piece].float(), beta2, out=seconds[piece]).addcmul_(rotated[piece], rotated[piece], value=1 - beta2)
        torch.div(first, (second / (1 - beta2**step)).sqrt_().add_(eps), out=directions[piece])
    directions = rotate_back(directions, bases)
    for piece in row_pieces(rotated):
        kept = exact(param[piece]).mul_(1 - lr * weight_decay)
        torch.sub(kept, directions[piece], alpha=lr / (1 - beta1**step), out=directions[piece])
    return directions, firsts, seconds


def gram(grad: Tensor, side: str) -> Tensor:
    """G G^T (left) or G^T G (right), float32."""
    rows = grad.float() if side == "left" else grad.float().T
    if rows.device.type != "cpu":
        return gram_in_blocks(rows)
    array = rows.numpy()
    return torch.from_numpy(array @ array.T)  # NumPy sees that the result is symmetric, and computes half of it; torch does not


def gram_in_blocks(rows: Tensor) -> Tensor:
    """M M^T of a matrix. It is symmetric: little more than half of it is computed, in rows up to the diagonal."""
    size = rows.shape[0]
    result = torch.empty(size, size, dtype=torch.float32, device=rows.device)
    edges = [size * block // GRAM_BLOCKS for block in range(GRAM_BLOCKS + 1)]
    for start, stop in pairwise(edges):
        torch.mm(rows[start:stop], rows[:stop].T, out=result[start:stop, :stop])
        result[:start, start:stop] = result[start:stop, :start].T
    return result


def first_basis(gram: Tensor) -> Tensor:
    """Eigenvectors of a Gram matrix as columns, that of the largest eigenvalue first."""
    basis: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)
    return basis.contiguous()


def next_basis(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The basis after one power iteration, and which old column each new one comes from (arXiv 2409.11321, algorithm 4).

    Columns are first sorted by the eigenvalues that they stand for, diag(Q^T L Q), largest first.
    """
    image = gram @ basis
    order = (basis * image).sum(dim=0).argsort(descending=True, stable=True)
    return torch.linalg.qr(image[:, order]).Q.contiguous(), order


class Soap(TensorwiseOptimizer):
    """SOAP over bfloat16 (stochastically rounded) or float32 weights; the moments have the dtype of their weight.

    The first step only starts the bases of a matrix: it moves no weight but those of vectors. If it is left out, the bases start as the
    axes. `precond_every` is in steps. `seed` keys the rounding. All are part of the parameter groups, and so of the state dict. `kernel` is
    as `chosen_kernel` has it: of bfloat16 weights on a CPU, rounding is compiled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        max_precond_dim: int = 1280,
        precond_every: int = 10,
        kernel: Kernel = "auto",
        seed: int,
    ) -> None:
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**adam, "max_precond_dim": max_precond_dim, "precond_every": precond_every, "seed": seed})
        self.kernel = chosen_kernel(kernel, [param for group in self.param_groups for param in group["params"]])

    def kind(self, param: Tensor) -> Hashable:
        return super().kind(param) if param.dim() < 2 else id(param)

    def initial_state(self, param: Tensor, group: dict[str, Any]) -> State:
        return {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}

    def advance(self, params: Sequence[Tensor], unit: Unit, step: int, finite: Tensor | None) -> None:
        if params[0].dim() < 2:
            self._advance_vectors(params, unit, step, finite)
            return
        (param,) = params
        if param.grad is None:
            return
        state, grad, group = self.state[param], param.grad.flatten(1).float(), unit.group
        beta2, bases = group["betas"][1], (state.get("basis_left"), state.get("basis_right"))
        if step == 1:
            state.update(first_preconditioner(grad, beta2, group["max_precond_dim"], finite))
            return
        old, exp_avg, exp_avg_sq = (tensor.flatten(1) for tensor in (param, state["exp_avg"], state["exp_avg_sq"]))
        settings = {key: group[key] for key in ADAMW_SETTINGS}
        value, exp_avg, exp_avg_sq = soap(old, grad, exp_avg, exp_avg_sq, bases, step=step - 1, **settings)
        for side in SIDES:
            if f"gram_{side}" in state:
                blend_(state[f"gram_{side}"], gram(grad, side), 1 - beta2, finite)
        if (step + unit.index) % group["precond_every"] == 0:
            exp_avg, exp_avg_sq = refresh_(state, exp_avg, exp_avg_sq, finite)
        targets, results = (state["exp_avg"], state["exp_avg_sq"], param), (exp_avg, exp_avg_sq, value)
        key = self.key(unit, step)
        if self.kernel != "compiled" or not compiled.round_rows_(targets, results, key, finite):
            round_rows_(targets, results, key, finite)

    def _advance_vectors(self, params: Sequence[Tensor], unit: Unit, step: int, finite: Tensor | None) -> None:
        targets = [params, *([self.state[param][name] for param in params] for name in ("exp_avg", "exp_avg_sq"))]
        joined, grad = [join(tensors) for tensors in targets], join([param.grad for param in params if param.grad is not None])
        settings, key = {name: unit.group[name] for name in ADAMW_SETTINGS}, self.key(unit, step)
        for piece in pieces(grad):
            adamw_(*(vector[piece] for vector in (grad, *joined)), step=step, key=key, start=piece.start, finite=finite, **settings)
        for tensors, vector in zip(targets, joined, strict=True):
            spread_(vector, tensors)


def round_rows_(targets: Sequence[Tensor], results: Sequence[Tensor], key: Key, finite: Tensor | None = None) -> None:
    """Write float32 matrices (O, I) into the moments and the weight that they are of, in whatever shape, as `copy_stochastic_` does."""
    for piece in row_pieces(results[0]):
        parts = [target[piece] for target in targets]
        drawn = draw_for(parts[0], key, piece.start * results[0].shape[1])
        for part, result, random_bits in zip(parts, results, drawn, strict=True):
            copy_stochastic_(part, result[piece].view(part.shape), random_bits, finite)


def blend_(mean: Tensor, value: Tensor, weight: float, finite: Tensor | None = None) -> None:
    """Move a running mean towards a value, if `finite`."""
    if finite is None:
        mean.lerp_(value, weight)
    else:
        write_(mean, torch.lerp(mean, value, weight), finite)


def first_preconditioner(grad: Tensor, beta: float, max_dim: int, finite: Tensor | None = None) -> State:
    """Gram matrices and bases of the first gradient (O, I), or of a zero one if it is not `finite`, for the sides that are not too long."""
    state: State = {}
    for side, size in zip(SIDES, preconditioned_dims(grad.shape, max_dim), strict=True):
        if size is not None:
            first = gram(grad, side).mul_(1 - beta)
            state[f"gram_{side}"] = torch.zeros_like(first)
            write_(state[f"gram_{side}"], first, finite)
            state[f"basis_{side}"] = first_basis(state[f"gram_{side}"])
    return state


def turned(matrix: Tensor, old: Tensor, new: Tensor, dim: int) -> Tensor:
    """A matrix whose dimension `dim` is in the basis `old`, in the basis `new`: in the order that takes fewer multiplications."""
    if dim == 0:
        return (new.T @ old) @ matrix if len(old) < matrix.shape[1] else new.T @ (old @ matrix)
    return matrix @ (old.T @ new) if len(old) < matrix.shape[0] else (matrix @ old.T) @ new


def refresh_(state: State, exp_avg: Tensor, exp_avg_sq: Tensor, finite: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """New bases in `state`, if `finite`, and the moments in them: the first is turned from old to new, the second follows the sorting."""
    for dim, side in enumerate(SIDES):
        if f"gram_{side}" in state:
            basis, order = next_basis(state[f"gram_{side}"], state[f"basis_{side}"])
            exp_avg, exp_avg_sq = turned(exp_avg, state[f"basis_{side}"], basis, dim), exp_avg_sq.index_select(dim, order)
            write_(state[f"basis_{side}"], basis, finite)
    return exp_avg, exp_avg_sq
