import pytest
import torch
from torch.nn import Parameter

from aquatint.optim import soap as module
from aquatint.optim.soap import Soap, first_basis, gram, gram_in_blocks, next_basis, rotate, rotate_back, turned

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(step: int, *shape: int) -> torch.Tensor:
    """Gradients with a direction that stays, so that the bases have something to find."""
    return 0.3 * randn(1000 + step, *shape) + randn(5, *shape) * (1 + step % 3)


def train(param: Parameter, steps: range, **settings) -> Soap:
    optimizer = Soap([param], **{**SETTINGS, "max_precond_dim": 64, "precond_every": 4, **settings}, seed=0)
    for step in steps:
        param.grad = gradient(step, *param.shape).to(param.dtype)
        optimizer.step()
    return optimizer


def orthogonal(seed: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(randn(seed, size, size)).Q


class Reference:
    """SOAP as its paper tells it, one matrix at a time and without thrift: the momentum is kept unrotated between steps."""

    def __init__(self, param: torch.Tensor, every: int, max_dim: int) -> None:
        self.param, self.every = param.flatten(1).clone(), every
        self.dims = [dim for dim, size in enumerate(self.param.shape) if size <= max_dim]
        self.shampoo = {dim: torch.zeros(self.param.shape[dim], self.param.shape[dim]) for dim in self.dims}
        self.basis: dict[int, torch.Tensor] = {}
        self.momentum, self.second, self.calls = torch.zeros_like(self.param), torch.zeros_like(self.param), 0

    def along(self, tensor: torch.Tensor, transposed: bool) -> torch.Tensor:
        for dim, basis in self.basis.items():
            tensor = torch.tensordot(tensor, basis if transposed else basis.T, dims=([dim], [0])).movedim(-1, dim)
        return tensor

    def accumulate(self, grad: torch.Tensor, beta: float) -> None:
        for dim in self.dims:
            other = 1 - dim
            self.shampoo[dim] = beta * self.shampoo[dim] + (1 - beta) * torch.tensordot(grad, grad, dims=([other], [other]))

    def refresh(self) -> None:
        for dim in self.dims:
            matrix, old = self.shampoo[dim], self.basis[dim]
            order = torch.diag(old.T @ matrix @ old).argsort(descending=True)
            self.second = self.second.index_select(dim, order)
            self.basis[dim] = torch.linalg.qr(matrix @ old[:, order]).Q

    def step(self, grad: torch.Tensor) -> None:
        grad, (beta1, beta2) = grad.flatten(1), SETTINGS["betas"]
        self.calls += 1
        if self.calls == 1:
            self.accumulate(grad, beta2)
            self.basis = {dim: torch.linalg.eigh(self.shampoo[dim]).eigenvectors.flip(1) for dim in self.dims}
            return
        count = self.calls - 1
        self.momentum = beta1 * self.momentum + (1 - beta1) * grad
        self.second = beta2 * self.second + (1 - beta2) * self.along(grad, True) ** 2
        ratio = self.along(self.momentum, True) / (1 - beta1**count) / ((self.second / (1 - beta2**count)).sqrt() + SETTINGS["eps"])
        self.param = (1 - SETTINGS["lr"] * SETTINGS["weight_decay"]) * self.param - SETTINGS["lr"] * self.along(ratio, False)
        self.accumulate(grad, beta2)
        if self.calls % self.every == 0:
            self.refresh()


@pytest.mark.parametrize(("shape", "max_dim"), [((7, 5), 64), ((12, 6), 8), ((5, 3, 2, 2), 64), ((6, 4, 3, 3), 10)])
def test_200_steps_are_those_of_a_slow_reference(shape, max_dim):
    param = Parameter(randn(0, *shape))
    reference = Reference(param.detach(), every=4, max_dim=max_dim)
    start = param.detach().clone()
    train(param, range(200), max_precond_dim=max_dim)
    for step in range(200):
        reference.step(gradient(step, *shape))
    moved, expected = param.detach() - start, reference.param.view(shape) - start
    assert (moved - expected).norm() < 0.05 * expected.norm()  # where eigenvalues are equal any basis will do, and the paths part a little


def test_the_first_steps_are_exactly_those_of_the_reference():
    """Of a square matrix: a longer one begins with eigenvalues of zero, whose eigenvectors only the last bit of each product decides."""
    param = Parameter(randn(0, 6, 6))
    reference = Reference(param.detach(), every=4, max_dim=64)
    train(param, range(10))
    for step in range(10):
        reference.step(gradient(step, 6, 6))
    torch.testing.assert_close(param.detach(), reference.param, rtol=1e-5, atol=1e-5)


def test_without_a_basis_it_is_adamw_from_the_second_step_on():
    ours, theirs = Parameter(randn(0, 6, 5)), Parameter(randn(0, 6, 5))
    train(ours, range(50), max_precond_dim=0)
    optimizer = torch.optim.AdamW([theirs], **SETTINGS)
    for step in range(1, 50):
        theirs.grad = gradient(step, 6, 5)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_dim", [0, 5, 6])
def test_a_step_leaves_the_gradient_as_it_is(max_dim):
    param = Parameter(randn(0, 6, 5))
    optimizer = train(param, range(2), max_precond_dim=max_dim)
    param.grad = gradient(2, 6, 5)
    optimizer.step()
    assert torch.equal(param.grad, gradient(2, 6, 5))


def test_vectors_get_adamw_from_the_first_step_on():
    ours, theirs = Parameter(randn(0, 9)), Parameter(randn(0, 9))
    train(ours, range(50))
    optimizer = torch.optim.AdamW([theirs], **SETTINGS)
    for step in range(50):
        theirs.grad = gradient(step, 9)
        optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_a_matrix_only_starts_its_bases():
    param = Parameter(randn(0, 6, 5))
    before = param.detach().clone()
    optimizer = train(param, range(1))
    assert torch.equal(param.detach(), before)
    state, grad = optimizer.state[param], gradient(0, 6, 5)
    torch.testing.assert_close(state["gram_left"], 0.05 * grad @ grad.T)
    torch.testing.assert_close(state["gram_right"], 0.05 * grad.T @ grad)
    diagonal = state["basis_left"].T @ state["gram_left"] @ state["basis_left"]
    torch.testing.assert_close(diagonal, diagonal.diag().sort(descending=True).values.diag(), atol=1e-5, rtol=0)


def test_bases_stay_orthogonal_through_refreshes():
    param = Parameter(randn(0, 20, 12))
    state = train(param, range(100)).state[param]
    for side, size in (("left", 20), ("right", 12)):
        basis = state[f"basis_{side}"]
        torch.testing.assert_close(basis.T @ basis, torch.eye(size), atol=1e-5, rtol=0)


def test_refreshing_turns_towards_the_eigenvectors():
    matrix = gram(randn(0, 6, 40) * torch.tensor([10.0, 5.0, 2.5, 1.2, 0.6, 0.3]).unsqueeze(1), "left")
    basis = orthogonal(1, 6)
    for _ in range(60):
        basis, _ = next_basis(matrix, basis)
    expected = first_basis(matrix)
    torch.testing.assert_close((basis * expected).sum(dim=0).abs(), torch.ones(6), atol=1e-3, rtol=0)


def test_a_refresh_keeps_the_momentum_and_lets_the_second_moment_follow_the_sorting():
    param = Parameter(randn(0, 8, 6))
    state = train(param, range(10), precond_every=1000).state[param]
    exp_avg, exp_avg_sq = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    before = rotate_back(exp_avg, (state["basis_left"], state["basis_right"]))
    rotated, sorted_sq = module.refresh_(state, exp_avg, exp_avg_sq)
    torch.testing.assert_close(rotate_back(rotated, (state["basis_left"], state["basis_right"])), before)
    assert rotated.norm().item() == pytest.approx(exp_avg.norm().item(), rel=1e-5)
    assert sorted_sq.flatten().sort().values.tolist() == exp_avg_sq.flatten().sort().values.tolist()


def test_a_rotated_problem_is_solved_as_the_unrotated_one():
    """Gradients U G V^T move the weights by U dW V^T: Adam would not, whose axes are those of the weights."""
    left, right = orthogonal(1, 5), orthogonal(2, 5)
    plain, turned = Parameter(torch.zeros(5, 5)), Parameter(torch.zeros(5, 5))
    for param, turn in ((plain, lambda g: g), (turned, lambda g: rotate_back(g, (left, right)))):
        optimizer = Soap([param], **SETTINGS, precond_every=1000, seed=0)
        for step in range(5):
            param.grad = turn(gradient(step, 5, 5))
            optimizer.step()
    torch.testing.assert_close(turned.detach(), rotate_back(plain.detach(), (left, right)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("shape", [(9, 4), (3, 20), (1, 2), (16, 16)])
def test_gram_matrices_are_products_with_the_transpose(shape):
    grad = randn(0, *shape).bfloat16()
    rows = grad.float()
    for side, matrix in (("left", rows), ("right", rows.T)):
        for found in (gram(grad, side), gram_in_blocks(matrix)):
            assert torch.equal(found, found.T)
            torch.testing.assert_close(found, matrix @ matrix.T)


@pytest.mark.parametrize(("shape", "dim"), [((4, 9), 0), ((9, 4), 0), ((4, 9), 1), ((9, 4), 1)])
def test_a_matrix_is_turned_from_one_basis_to_another_in_either_order_of_products(shape, dim):
    matrix, old, new = randn(0, *shape), orthogonal(1, shape[dim]), orthogonal(2, shape[dim])
    bases = [(old, None), (new, None)] if dim == 0 else [(None, old), (None, new)]
    torch.testing.assert_close(turned(matrix, old, new, dim), rotate(rotate_back(matrix, bases[0]), bases[1]))


def test_rotating_there_and_back_changes_nothing():
    matrix = randn(0, 4, 6)
    for bases in [(orthogonal(1, 4), orthogonal(2, 6)), (None, orthogonal(2, 6)), (orthogonal(1, 4), None), (None, None)]:
        torch.testing.assert_close(rotate_back(rotate(matrix, bases), bases), matrix)


def test_tensors_take_turns_with_their_refreshes(monkeypatch):
    refreshed: list[list[int]] = []
    real = module.refresh_

    def recording(state, *moments):
        refreshed[-1].append(state["gram_left"].shape[0])
        return real(state, *moments)

    monkeypatch.setattr(module, "refresh_", recording)
    params = [Parameter(randn(size, size, 3)) for size in (4, 5, 6, 7)]
    optimizer = Soap(params, **SETTINGS, precond_every=4, seed=0)
    for step in range(9):
        refreshed.append([])
        for param in params:
            param.grad = gradient(step, *param.shape)
        optimizer.step()
    assert refreshed == [[], [6], [5], [4], [7], [6], [5], [4], [7]]


def test_a_side_that_is_too_long_is_not_rotated():
    param = Parameter(randn(0, 6, 4, 3, 3))
    state = train(param, range(3), max_precond_dim=10).state[param]
    assert state["gram_left"].shape == state["basis_left"].shape == (6, 6)
    assert not any(key.endswith("right") for key in state)
