import torch

from aquatint.diffusion.loss import per_sample_mse


def test_loss_is_the_mean_over_each_sample_on_its_own():
    output = torch.stack([torch.full((4, 2, 3), 1.0), torch.full((4, 2, 3), -2.0)])
    assert per_sample_mse(output, torch.zeros(2, 4, 2, 3)).tolist() == [1.0, 4.0]


def test_loss_of_half_precision_outputs_is_computed_in_float32():
    target = torch.full((1, 4, 8, 8), 1.0 + 2**-12)
    loss = per_sample_mse(torch.ones(1, 4, 8, 8, dtype=torch.bfloat16), target)
    assert loss.dtype == torch.float32
    assert loss.item() == 2.0**-24


def test_gradient_of_a_sample_does_not_see_the_others():
    output = torch.zeros(3, 4, 2, 2, requires_grad=True)
    per_sample_mse(output, torch.ones(3, 4, 2, 2))[1].backward()
    assert output.grad is not None
    assert output.grad.flatten(1).abs().sum(dim=1).tolist() == [0.0, 2.0, 0.0]
