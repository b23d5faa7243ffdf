import pytest
import torch
from torch import nn

from aquatint.models.patchgan import adaptive_weight, build_discriminator, discriminator_loss, generator_loss


def test_each_verdict_is_on_a_patch_of_seventy_pixels():
    """The receptive field of pix2pix's PatchGAN, counted backwards: field = (field - 1) * stride + 4."""
    strides = [layer.stride[0] for layer in build_discriminator(0) if isinstance(layer, nn.Conv2d)]
    field = 1
    for stride in reversed(strides):
        field = (field - 1) * stride + 4
    assert (strides, field) == ([2, 2, 2, 1, 1], 70)
    assert build_discriminator(0)(torch.zeros(2, 3, 64, 96)).shape == (2, 1, 6, 10)


def test_weights_are_those_of_its_seed_with_the_paper_s_deviation():
    first, again, other = (build_discriminator(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert first["8.weight"].std().item() == pytest.approx(0.02, rel=0.01)
    assert first["3.weight"].mean().item() == pytest.approx(1.0, abs=0.01)
    assert torch.equal(first["0.bias"], torch.zeros(64))


def test_it_remembers_nothing_but_its_weights():
    discriminator = build_discriminator(0)
    assert list(discriminator.buffers()) == []
    assert set(discriminator.state_dict()) == {name for name, _ in discriminator.named_parameters()}


def test_the_hinge_losses_are_their_closed_forms():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(((0 + 0.5 + 2) / 3 + (0 + 0.5 + 2) / 3) / 2)
    assert generator_loss(fake).item() == pytest.approx(0.5)


def test_the_adaptive_weight_is_its_closed_form_on_a_linear_layer():
    """output = w x. ||grad sum(a output)|| = |a| ||x||, so the weight is |a| ||x|| / (|b| ||x|| + 1e-4)."""
    last, x = nn.Parameter(torch.tensor([0.3, -0.2, 0.5])), torch.tensor([2.0, -1.0, 2.0])
    output = last @ x
    assert adaptive_weight(5.0 * output, -0.25 * output, last).item() == pytest.approx(5 * 3 / (0.25 * 3 + 1e-4), rel=1e-6)
    assert adaptive_weight(5.0 * output, 0.0 * output, last).item() == 1e4
    assert adaptive_weight(0.0 * output, 1.0 * output, last).item() == 0.0
    assert last.grad is None
