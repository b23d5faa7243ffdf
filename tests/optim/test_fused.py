import pytest
import torch
from torch import nn

from aquatint.optim import tensorwise
from aquatint.optim.clipping import Clipping, tensor_norms, whole_norm
from aquatint.optim.create import create_optimizer
from aquatint.optim.fused import FusedBackward

from .test_create import EACH_KIND, make, model
from .test_tensorwise import held

CLIPS = [("global", 0.0), ("per_tensor", 0.05), ("delayed", 0.05)]


def loss_of(module: nn.Module, step: int, part: int = 0) -> torch.Tensor:
    bits = torch.Generator().manual_seed(100 * step + part)
    dtype = next(module.parameters()).dtype
    return module(torch.randn(3, 4, 5, 5, generator=bits).to(dtype)).float().square().mean()


def run(module: nn.Module, optimizer, clipping: Clipping, steps: int, *, parts: int = 1) -> list[float]:
    """Ordinary steps after the backward passes; returns the norm of each step's gradient."""
    norms = []
    for step in range(steps):
        for part in range(parts):
            loss_of(module, step, part).backward()
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        each = tensor_norms(params)
        norms.append(whole_norm(each))
        clipping.clip_(params, each)
        clipping.remember(norms[-1])
        optimizer.step()
        optimizer.zero_grad()
    return [norm.item() for norm in norms]


def run_fused(module: nn.Module, optimizer, clipping: Clipping, steps: int, *, parts: int = 1) -> list[float]:
    """The same with steps from inside the last backward pass."""
    fused, norms = FusedBackward(optimizer, clipping), []
    for step in range(steps):
        for part in range(parts):
            if part == parts - 1:
                fused.arm(torch.tensor(True))
            loss_of(module, step, part).backward()
        norm, finite = fused.finish()
        assert finite
        assert all(param.grad is None for param in module.parameters())
        norms.append(norm.item())
    fused.remove()
    return norms


def assert_same(one: nn.Module, optimizer, other: nn.Module, other_optimizer) -> None:
    for param, twin in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(param, twin)
        state, twin_state = optimizer.state[param], other_optimizer.state[twin]
        assert state.keys() == twin_state.keys()
        assert all(torch.equal(state[key], twin_state[key]) for key in state)


@EACH_KIND
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip[0])
@pytest.mark.parametrize("parts", [1, 2])
def test_steps_inside_the_backward_pass_have_the_bits_of_steps_after_it(name, dtype, clip, parts):
    after, inside = model(dtype), model(dtype)
    optimizers = make(name, after), make(name, inside)
    norms = run(after, optimizers[0], Clipping(*clip), 4, parts=parts)
    assert run_fused(inside, optimizers[1], Clipping(*clip), 4, parts=parts) == norms
    assert_same(after, optimizers[0], inside, optimizers[1])


def test_small_tensors_wait_for_each_other_and_end_as_in_one_step(monkeypatch):
    monkeypatch.setattr(tensorwise, "JOINED_ELEMENTS", 300)
    after, inside = model(torch.bfloat16), model(torch.bfloat16)
    optimizers = make("adamw_bf16", after), make("adamw_bf16", inside)
    assert [len(unit.params) for unit in optimizers[0].units()] == [1, 1, 1, 5]
    run(after, optimizers[0], Clipping("global", 0.0), 3)
    run_fused(inside, optimizers[1], Clipping("global", 0.0), 3)
    assert_same(after, optimizers[0], inside, optimizers[1])


class Half(nn.Module):
    """Uses only one of its two layers, by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(100, 5), nn.Linear(100, 5)])
        self.calls = 0

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layers[self.calls // 2 % 2](pictures.flatten(1))


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adamw8bit", "soap"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_weights_without_a_gradient_in_the_last_pass_or_at_all_are_stepped_as_usual(name, parts):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        after, inside = Half(), Half()
    inside.load_state_dict(after.state_dict())
    optimizers = make(name, after), make(name, inside)
    norms = run(after, optimizers[0], Clipping("per_tensor", 0.1), 5, parts=parts)
    assert run_fused(inside, optimizers[1], Clipping("per_tensor", 0.1), 5, parts=parts) == norms
    assert_same(after, optimizers[0], inside, optimizers[1])


def test_gradient_checkpointing_changes_nothing():
    class Deep(nn.Module):
        def __init__(self, checkpointing: bool) -> None:
            super().__init__()
            self.layers, self.checkpointing = nn.ModuleList(nn.Linear(100, 100) for _ in range(3)), checkpointing

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            hidden = pictures.flatten(1)
            for layer in self.layers:
                block = lambda x, layer=layer: layer(x).tanh()  # noqa: E731
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False) if self.checkpointing else block(hidden)
            return hidden

    with torch.random.fork_rng():
        torch.manual_seed(0)
        after, inside = Deep(False), Deep(True)
    inside.load_state_dict(after.state_dict())
    optimizers = make("adamw_bf16", after), make("adamw_bf16", inside)
    run(after, optimizers[0], Clipping("global", 0.0), 3)
    run_fused(inside, optimizers[1], Clipping("global", 0.0), 3)
    assert_same(after, optimizers[0], inside, optimizers[1])


def test_gradients_are_never_there_all_at_once():
    module = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(8)))
    fused = FusedBackward(create_optimizer("adafactor", module.named_parameters(), seed=0, learning_rate=1e-3, weight_decay=0.0),
                          Clipping("per_tensor", 1.0))  # fmt: skip
    alive = []
    for param in module.parameters():
        param.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in module.parameters())))
    fused.arm(torch.tensor(True))
    module(torch.randn(2, 100)).square().mean().backward()
    fused.finish()
    assert alive == [0] * 8


def test_outside_of_arm_and_finish_gradients_add_up():
    module = model()
    FusedBackward(make("adafactor", module), Clipping("per_tensor", 1.0))
    before = [param.detach().clone() for param in module.parameters()]
    loss_of(module, 0).backward()
    first = [param.grad.clone() for param in module.parameters()]
    loss_of(module, 0).backward()
    assert all(torch.equal(param, old) for param, old in zip(module.parameters(), before, strict=True))
    for param, grad in zip(module.parameters(), first, strict=True):
        torch.testing.assert_close(param.grad, 2 * grad)


def test_a_clip_by_the_norm_of_the_whole_gradient_is_refused():
    with pytest.raises(ValueError, match="cannot clip by the norm of the whole"):
        FusedBackward(make("adamw", model()), Clipping("global", 1.0))


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adafactor"])
def test_a_gradient_that_is_not_finite_moves_nothing_of_its_unit_and_is_reported(name, monkeypatch):
    monkeypatch.setattr(tensorwise, "JOINED_ELEMENTS", 1)
    module = nn.Sequential(nn.Linear(100, 5, bias=False), nn.Linear(5, 1, bias=False))
    optimizer, clipping = make(name, module), Clipping("delayed", 1.0)
    fused = FusedBackward(optimizer, clipping)
    for broken in (False, True, False):
        before = [param.detach().clone() for param in module.parameters()]
        norm_before = clipping.previous_norm.clone()
        handle = module[0].weight.register_hook(lambda grad: grad * torch.nan) if broken else None
        fused.arm(torch.tensor(True))
        module(torch.ones(2, 100)).square().mean().backward()
        norm, finite = fused.finish()
        if handle is not None:
            handle.remove()
        assert bool(finite) is not broken
        assert bool(norm.isfinite()) is not broken
        assert [torch.equal(param, old) for param, old in zip(module.parameters(), before, strict=True)] == [broken, False]
        assert torch.equal(clipping.previous_norm, norm_before) is broken
        assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())
    assert [int(optimizer.state[param]["step"]) for param in module.parameters()] == [3, 3]


@EACH_KIND
def test_a_loss_that_is_not_finite_moves_nothing_at_all(name, dtype):
    module, clipping = model(dtype), Clipping("delayed", 0.05)
    optimizer = make(name, module)
    run_fused(module, optimizer, clipping, 2)
    before = [tensor.clone() for tensor in held(module, optimizer)] + [clipping.previous_norm.clone()]
    fused = FusedBackward(optimizer, clipping)
    fused.arm(torch.tensor(False))
    loss_of(module, 2).backward()
    norm, finite = fused.finish()
    assert norm.isfinite()
    assert not finite
    assert all(torch.equal(one, old) for one, old in zip([*held(module, optimizer), clipping.previous_norm], before, strict=True))
    assert all(param.grad is None for param in module.parameters())
