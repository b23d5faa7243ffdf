import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_

from aquatint.optim.clipping import Clipping, tensor_norms, whole_norm


def weights() -> list[Parameter]:
    """Three gradients of norms 3, 4 and 12: together 13."""
    params = [Parameter(torch.zeros(1, 4)), Parameter(torch.zeros(2, 2)), Parameter(torch.zeros(9))]
    for param, norm in zip(params, (3.0, 4.0, 12.0), strict=True):
        param.grad = torch.zeros_like(param)
        param.grad.view(-1)[1] = -norm
    return params


def clipped(clipping: Clipping) -> list[float]:
    params = weights()
    clipping.clip_(params, tensor_norms(params))
    return [norm.item() for norm in tensor_norms(params)]


def test_norms_are_of_each_tensor_and_of_all():
    assert [norm.item() for norm in tensor_norms(weights())] == [3.0, 4.0, 12.0]
    assert whole_norm(tensor_norms(weights())).item() == 13.0


def test_norms_of_half_precision_gradients_are_exact():
    """In bf16 the sum of 1000 ones would stop at 256."""
    param = Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    assert tensor_norms([param])[0].item() == pytest.approx(1000**0.5, rel=1e-6)


def test_the_whole_gradient_is_scaled_to_the_largest_norm():
    assert clipped(Clipping("global", 6.5)) == pytest.approx([1.5, 2.0, 6.0], rel=1e-5)
    assert clipped(Clipping("global", 14.0)) == [3.0, 4.0, 12.0]


def test_each_tensor_is_scaled_on_its_own():
    assert clipped(Clipping("per_tensor", 3.5)) == pytest.approx([3.0, 3.5, 3.5], rel=1e-5)


def test_the_norm_of_the_step_before_decides():
    clipping = Clipping("delayed", 2.0)
    assert clipped(clipping) == [3.0, 4.0, 12.0]  # there is none yet
    clipping.remember(torch.tensor(4.0))
    assert clipped(clipping) == pytest.approx([1.5, 2.0, 6.0], rel=1e-5)
    clipping.remember(torch.tensor(1.0))
    assert clipped(clipping) == [3.0, 4.0, 12.0]


@pytest.mark.parametrize("mode", ["global", "per_tensor", "delayed"])
def test_zero_does_not_clip(mode):
    clipping = Clipping(mode, 0.0)
    clipping.remember(torch.tensor(100.0))
    assert clipped(clipping) == [3.0, 4.0, 12.0]


@pytest.mark.parametrize("mode", ["global", "per_tensor", "delayed"])
@pytest.mark.parametrize("norm", [1.0, 3.4999988, 3.4999991, 3.5, 4.0, torch.inf, torch.nan])
def test_each_bit_is_that_of_torchs_own_clip_and_what_is_short_enough_is_not_touched(mode, norm):
    ours, theirs = weights(), weights()
    clipping = Clipping(mode, 3.5)
    clipping.previous_norm.fill_(norm)
    clipping.clip_(ours, [torch.tensor(norm)] * 3, torch.tensor(norm))
    clip_grads_with_norm_(theirs, 3.5, torch.tensor(norm))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.grad.view(torch.int32), other.grad.view(torch.int32))
    scale = torch.clamp(3.5 / (torch.tensor(norm) + 1e-6), max=1.0)
    assert (ours[0].grad._version > weights()[0].grad._version) == bool(scale != 1)


def test_the_norm_of_all_need_not_be_worked_out_twice(monkeypatch: pytest.MonkeyPatch):
    params = weights()
    norms = tensor_norms(params)
    whole = whole_norm(norms)
    monkeypatch.delattr("aquatint.optim.clipping.whole_norm")
    Clipping("global", 6.5).clip_(params, norms, whole)
    assert [norm.item() for norm in tensor_norms(params)] == pytest.approx([1.5, 2.0, 6.0], rel=1e-5)


def test_only_a_delayed_clip_has_something_to_save():
    assert Clipping("global", 1.0).state == {}
    assert Clipping("per_tensor", 1.0).state == {}
    clipping = Clipping("delayed", 1.0)
    clipping.remember(torch.tensor(3.0))
    assert clipping.state["previous_norm"].item() == 3.0
