import copy

import pytest
import torch
from torch import Tensor, nn

from .test_create import EACH_KIND, make, model, train

LEFT_OUT, TAKEN = torch.tensor(False), torch.tensor(True)


def held(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that a step changes but the step counts."""
    states = [value for param in module.parameters() for name, value in optimizer.state[param].items() if name != "step"]
    return [*(param.detach() for param in module.parameters()), *states]


def give_gradients(module: nn.Module, value: float | None = None, seed: int = 7) -> None:
    for index, param in enumerate(module.parameters()):
        bits = torch.Generator().manual_seed(1000 * seed + index)
        param.grad = torch.randn(param.shape, generator=bits).to(param.dtype)
        if value is not None and index % 2:
            param.grad.view(-1)[0] = value


@EACH_KIND
@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_a_step_that_is_left_out_changes_no_bit_and_is_counted(name, dtype, value):
    """Whether all of the gradient is at fault, a part of it, or only the loss. With `soap`, bases are due for a refresh."""
    module = model(dtype)
    optimizer = make(name, module)
    train(module, optimizer, range(4))
    before = [tensor.clone() for tensor in held(module, optimizer)]
    for times in range(1, 4):
        give_gradients(module, value)
        optimizer.step(finite=LEFT_OUT)
        for one, old in zip(held(module, optimizer), before, strict=True):
            assert torch.equal(one.view(torch.uint8), old.view(torch.uint8))
        assert {int(optimizer.state[param]["step"]) for param in module.parameters()} == {4 + times}


@EACH_KIND
def test_a_first_step_that_is_left_out_leaves_a_state_to_go_on_from(name, dtype):
    module, fresh = model(dtype), model(dtype)
    optimizer = make(name, module)
    give_gradients(module, float("nan"))
    optimizer.step(finite=LEFT_OUT)
    assert all(torch.equal(param, same) for param, same in zip(module.parameters(), fresh.parameters(), strict=True))
    train(module, optimizer, range(5))
    assert all(tensor.isfinite().all() for tensor in held(module, optimizer))
    assert not any(torch.equal(param, same) for param, same in zip(module.parameters(), fresh.parameters(), strict=True))


@EACH_KIND
def test_a_step_that_the_device_lets_through_has_the_bits_of_any_other(name, dtype):
    one, other = model(dtype), model(dtype)
    optimizers = make(name, one), make(name, other)
    for step in range(5):
        give_gradients(one, seed=step)
        give_gradients(other, seed=step)
        optimizers[0].step()
        optimizers[1].step(finite=TAKEN)
    for tensor, twin in zip(held(one, optimizers[0]), held(other, optimizers[1]), strict=True):
        assert torch.equal(tensor, twin)


@EACH_KIND
def test_a_step_count_that_was_replaced_is_read_anew(name, dtype):
    """As a checkpoint does it, which puts whole states in the place of others."""
    straight = model(dtype)
    optimizer = make(name, straight)
    train(straight, optimizer, range(3))
    kept, states = copy.deepcopy(straight), copy.deepcopy([optimizer.state[param] for param in straight.parameters()])
    train(straight, optimizer, range(3, 6))

    again = model(dtype)
    other = make(name, again)
    train(again, other, range(1))
    again.load_state_dict(kept.state_dict())
    for param, state in zip(again.parameters(), states, strict=True):
        other.state[param] = state
    train(again, other, range(3, 6))
    for tensor, twin in zip(held(straight, optimizer), held(again, other), strict=True):
        assert torch.equal(tensor, twin)
