from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aquatint.errors import NumericalError
from aquatint.optim.clipping import Clipping
from aquatint.optim.create import create_optimizer, idle_steps
from aquatint.optim.fused import FusedBackward
from aquatint.optim.groups import GroupSettings
from aquatint.training import audit
from aquatint.training.audit import Audit, conclusion, digests, expected_moves
from aquatint.training.state import TrainState
from aquatint.training.step import StepReport

ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}
GOOD = StepReport(1.0, 1.0, 1e-3, True, 1, ("a",))
BAD = StepReport(float("nan"), 1.0, 1e-3, False, 1, ("a",))


class Net(nn.Module):
    """`kept` is frozen; `cut` is used, and its gradient is zero."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.moved, self.cut, self.kept = (nn.Parameter((scale * torch.randn(8, 8, generator=draw)).to(dtype)) for _ in range(3))
        self.kept.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.moved @ (self.kept + 0 * self.cut)


class Looked:
    """An audit of a toy run, and what it said."""

    def __init__(self, name: str = "adamw", dtype: torch.dtype = torch.float32, rate: float = 1e-2, scale: float = 1.0, **settings) -> None:
        self.net = Net(dtype, scale)
        trained = [(key, p) for key, p in self.net.named_parameters() if p.requires_grad]
        self.optimizer = create_optimizer(name, trained, seed=0, learning_rate=rate, **{**ADAM, **settings})
        rates = SimpleNamespace(unet=self.net, optimizer=self.optimizer, learning_rate=lambda step: rate)
        self.said: list[str] = []
        self.audit = Audit(rates, self.said.append, idle_steps(name))

    def step(self, number: int = 0, report: StepReport = GOOD, *, inside: bool = False) -> bool:
        """One step, and a look if it is due. Returns whether it was."""
        fused = FusedBackward(self.optimizer, Clipping("global", 0.0)) if inside else None
        if fused is not None:
            fused.arm(torch.tensor(report.finite))
        self.net(torch.ones(4, 8, dtype=self.net.moved.dtype)).float().square().mean().backward()
        if fused is None:
            self.optimizer.step(finite=torch.tensor(report.finite))
            self.optimizer.zero_grad()
        else:
            fused.finish()
            fused.remove()
        before, after = TrainState(number), TrainState(number + 1)
        if due := self.audit.due(before, after):
            assert self.audit.run(after, report) is after
        return due


@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_moved_is_counted_and_what_had_no_gradient_is_named(inside, dtype):
    looked = Looked("adamw" if dtype == torch.float32 else "adamw_bf16", dtype)
    assert looked.step(inside=inside)
    assert looked.said == ["step 1 moved 1 of 2 trained tensors, none of 1 frozen", "  1 had no gradient in it, such as cut"]
    assert not looked.step(1)
    assert not looked.net.moved._backward_hooks


def test_a_frozen_tensor_that_moved_ends_the_run():
    looked = Looked()
    looked.net.kept.data[3, 3] += 1e-6
    with pytest.raises(NumericalError, match="step 1 moved 1 tensor that should be frozen: kept") as caught:
        looked.step()
    assert "this is a bug" in caught.value.hint


def test_a_trained_tensor_that_stayed_for_no_reason_is_a_warning():
    looked = Looked()
    looked.optimizer.step = lambda finite: None
    looked.step()
    assert looked.said[0] == "step 1 moved 0 of 2 trained tensors, none of 1 frozen"
    assert looked.said[-1] == "warning: 1 trained tensor did not move: moved"


def test_a_step_that_is_not_finite_is_not_looked_at():
    looked = Looked()
    assert looked.step(0, BAD)
    assert looked.said == []
    assert looked.step(1)
    assert looked.said[0] == "step 2 moved 1 of 2 trained tensors, none of 1 frozen"


def test_a_step_without_a_learning_rate_is_not_looked_at():
    looked = Looked()
    looked.audit.parts.learning_rate = lambda step: float(step)
    assert not looked.step(0)
    assert looked.step(1)


def test_an_optimizer_that_gets_ready_first_is_given_the_time():
    looked = Looked("soap", max_precond_dim=32, precond_every=10)
    assert not looked.step(0)
    assert looked.step(1)
    assert looked.said[0] == "step 2 moved 1 of 2 trained tensors, none of 1 frozen"


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "adamw"), (torch.bfloat16, "adamw_bf16")])
def test_a_step_below_the_distance_of_two_numbers_is_no_reason_to_worry(dtype, name):
    looked = Looked(name, dtype, rate=1e-9, scale=100.0)
    looked.step()
    assert "  1 will take more steps to show one in their number format, such as moved" in looked.said
    assert not any(line.startswith("warning") for line in looked.said)


def test_a_step_that_is_kept_beside_the_weight_counts_as_one():
    looked = Looked("adamw_bf16", torch.bfloat16, rate=1e-7, rounding="kahan")
    before = looked.net.moved.detach().clone()
    looked.step()
    assert torch.equal(looked.net.moved, before)
    assert looked.audit.explain(["moved", "cut"]).without_gradient == ("cut",)
    assert looked.audit.explain(["moved", "cut"]).unexplained == looked.audit.explain(["moved", "cut"]).too_small == ()
    assert looked.said[0].startswith("step 1 moved 1 of 2 trained tensors")


def test_the_rate_is_that_of_the_tensor_s_group():
    own = {"moved": GroupSettings(1e-9, 0.0)}
    looked = Looked(own=own)
    for group in looked.optimizer.param_groups:
        group["lr"] = 1e-2 * group["factor"]
    looked.step()
    assert "  1 will take more steps to show one in their number format, such as moved" in looked.said


def test_looking_changes_no_number():
    watched, plain = Looked(), Looked()
    plain.audit = SimpleNamespace(due=lambda before, after: False)
    state = torch.random.get_rng_state()
    for number in range(3):
        watched.step(number)
        plain.step(number)
    assert torch.equal(watched.net.moved, plain.net.moved)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_changed_bit_in_any_place_changes_the_digest(dtype, monkeypatch):
    monkeypatch.setattr(audit, "CHUNK", 4)
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = digests([tensor])
    assert torch.equal(digests([tensor.clone()]), before)
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    for place in range(63):
        changed = tensor.clone()
        changed.view(whole).view(-1)[place] ^= 1
        assert not torch.equal(digests([changed]), before)


def test_elements_that_change_places_change_the_digest():
    tensor = torch.arange(100.0)
    assert len(set(digests([tensor, tensor.flip(0), tensor.roll(1), tensor.view(10, 10).t().contiguous().view(-1)]).tolist())) == 4


def test_weights_that_lie_otherwise_in_memory_have_the_same_digest():
    tensor = torch.randn(2, 3, 4, 4)
    assert torch.equal(digests([tensor]), digests([tensor.to(memory_format=torch.channels_last)]))
    whole = torch.randn(11)
    assert torch.equal(digests([whole[1:]]), digests([whole[1:].clone()]))
    assert len(digests([torch.ones(()), torch.ones(3).bfloat16()]).unique()) == 2


def test_moves_are_expected_by_the_distance_to_the_next_number():
    ones = torch.ones(1000)
    assert expected_moves(ones, 1e-6) == float("inf")
    assert expected_moves(ones, 1e-8) == 0
    assert expected_moves(ones.bfloat16(), 1e-6) == pytest.approx(1000 * 1e-6 / 2**-7)
    assert expected_moves(torch.zeros(4), 1e-12) == float("inf")


def test_of_many_tensors_some_are_named():
    names = tuple(f"layer.{index}" for index in range(1200))
    lines = list(conclusion(audit.Unmoved(names, (), names[:8]), 1, num_trained=3000, num_frozen=2000))
    assert lines[0] == "step 1 moved 1,792 of 3,000 trained tensors, none of 2,000 frozen"
    assert lines[1] == "  1,200 had no gradient in it, such as layer.0"
    assert lines[2].endswith("layer.4, layer.5 and 2 more")
