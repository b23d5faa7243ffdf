import pytest
import torch
from torch.nn import Parameter

from aquatint.optim import tensorwise
from aquatint.optim.adamw_bf16 import AdamWBF16
from aquatint.optim.formula import adamw

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SHAPES = [(7,), (5, 3), (4, 2, 3, 3), (6,), (1,)]


def parameters(dtype: torch.dtype = torch.float32) -> list[Parameter]:
    bits = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=bits).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[Parameter], step: int) -> None:
    bits = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=bits) * 0.1).to(param.dtype)


def test_update_matches_its_vector():
    param, exp_avg, exp_avg_sq = torch.tensor([1.0]), torch.zeros(1), torch.zeros(1)
    for step, expected in [(1, 0.9989900001), (2, 0.9979800103)]:
        param, exp_avg, exp_avg_sq = adamw(param, torch.tensor([0.1]), exp_avg, exp_avg_sq, step=step, **SETTINGS)
        assert param.item() == pytest.approx(expected, rel=1e-7)
    assert exp_avg.item() == pytest.approx(0.1 * (1 - 0.9**2), rel=1e-6)
    assert exp_avg_sq.item() == pytest.approx(0.01 * (1 - 0.999**2), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_is_pure_and_answers_in_float32(dtype):
    inputs = [torch.rand(10, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(4)]
    before = [tensor.clone() for tensor in inputs]
    results = adamw(*inputs, step=3, **SETTINGS)
    assert all(result.dtype == torch.float32 for result in results)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


def test_float32_trajectory_is_that_of_torch():
    ours, theirs = parameters(), parameters()
    optimizers = [AdamWBF16(ours, **SETTINGS, seed=0), torch.optim.AdamW(theirs, **SETTINGS)]
    for step in range(200):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)


def descend(dtype: torch.dtype, update) -> torch.Tensor:
    """Mean weight after 600 small steps on |w - 0.9|^2 from 1."""
    param = Parameter(torch.ones(2000, dtype=dtype))
    step = update(param)
    for _ in range(600):
        param.grad = 2 * (param.detach() - 0.9)
        step()
    return param.detach().float().mean()


def rounding_to_nearest(param: Parameter):
    state = [torch.zeros_like(param), torch.zeros_like(param)]
    steps = iter(range(1, 601))

    def step() -> None:
        results = adamw(param.detach(), param.grad, *state, step=next(steps), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        for target, result in zip([param.detach(), *state], results, strict=True):
            target.copy_(result)

    return step


def test_bfloat16_follows_float32_where_rounding_to_the_nearest_stalls():
    exact = descend(torch.float32, lambda param: torch.optim.AdamW([param], lr=1e-4, weight_decay=0.0).step)
    stochastic = descend(torch.bfloat16, lambda param: AdamWBF16([param], lr=1e-4, weight_decay=0.0, seed=0).step)
    stalled = descend(torch.bfloat16, rounding_to_nearest)
    assert stalled == 1.0
    assert exact < 0.96
    assert stochastic.item() == pytest.approx(exact.item(), abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_has_the_dtype_and_shape_of_its_weight(dtype):
    params = parameters(dtype)
    optimizer = AdamWBF16(params, seed=0)
    set_gradients(params, 0)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"] == 1
        assert state["step"].dtype == torch.float32
        assert all(state[key].dtype == dtype and state[key].shape == param.shape for key in ("exp_avg", "exp_avg_sq"))


def test_tensors_updated_together_end_as_they_would_alone(monkeypatch):
    together, alone = parameters(), parameters()
    for params, room in ((together, 1 << 20), (alone, 1)):
        monkeypatch.setattr(tensorwise, "JOINED_ELEMENTS", room)
        optimizer = AdamWBF16(params, **SETTINGS, seed=0)
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_weights_without_gradient_are_left_alone_and_count_their_own_steps():
    params, reference = parameters(), parameters()
    optimizer, theirs = AdamWBF16(params, **SETTINGS, seed=0), torch.optim.AdamW(reference, **SETTINGS)
    for step in range(4):
        for tensors, optim in ((params, optimizer), (reference, theirs)):
            set_gradients(tensors, step)
            if step < 2:
                tensors[0].grad = tensors[3].grad = None
            optim.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [2, 4, 4, 2, 4]
    for ours, their in zip(params, reference, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-6, atol=1e-6)


def test_groups_have_their_own_settings():
    params = parameters(torch.bfloat16)
    before = [param.detach().clone() for param in params]
    optimizer = AdamWBF16([{"params": params[:2], "lr": 0.0}, {"params": params[2:], "lr": 0.1}], seed=0)
    set_gradients(params, 0)
    optimizer.step()
    assert [torch.equal(param, old) for param, old in zip(params, before, strict=True)] == [True, True, False, False, False]


def test_seed_decides_the_rounding():
    results = []
    for seed in (1, 1, 2):
        params = parameters(torch.bfloat16)
        optimizer = AdamWBF16(params, lr=1e-3, seed=seed)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        results.append(params[1].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_memory_format_does_not_change_an_update():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        param = Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16().to(memory_format=layout))
        optimizer = AdamWBF16([param], lr=1e-2, seed=0)
        for step in range(3):
            set_gradients([param], step)
            optimizer.step()
        assert param.is_contiguous(memory_format=layout)
        results.append(param.detach().contiguous())
    assert torch.equal(*results)


def test_step_returns_the_loss_of_a_closure():
    param = Parameter(torch.ones(3))
    optimizer = AdamWBF16([param], seed=0)

    def closure() -> float:
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    assert (param < 1).all()
