import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion.noise import adaptive_strength, draw_noise, draw_offset, immiscible, offset, perturbed, pyramid
from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.utils.seeds import generator


def test_each_sample_is_drawn_from_its_own_generator():
    noise = draw_noise(3, "noise", [5, 0], (4, 2, 3))
    assert noise.shape == (2, 4, 2, 3)
    assert noise.dtype == torch.float32
    for sample, position in zip(noise, [5, 0], strict=True):
        assert np.array_equal(sample.numpy(), generator(3, "noise", position).standard_normal((4, 2, 3), dtype=np.float32))


def test_golden_noise():
    assert draw_noise(0, "noise", [0], (1, 2, 2)).flatten().tolist() == [
        -1.150606632232666,
        0.06007951870560646,
        0.24495486915111542,
        -1.0306931734085083,
    ]


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(0, 7))
def test_noise_does_not_depend_on_how_the_positions_are_cut_into_batches(cut):
    positions = range(100, 107)
    parts = [draw_noise(0, "noise", positions[:cut], (4, 3, 2)), draw_noise(0, "noise", positions[cut:], (4, 3, 2))]
    assert torch.equal(torch.cat(parts), draw_noise(0, "noise", positions, (4, 3, 2)))


def test_streams_and_seeds_are_independent():
    draws = [draw_noise(0, "noise", [0], (4, 8, 8)), draw_noise(0, "latent", [0], (4, 8, 8)), draw_noise(1, "noise", [0], (4, 8, 8))]
    assert not any(torch.equal(draws[a], draws[b]) for a, b in [(0, 1), (0, 2), (1, 2)])


def test_noise_is_standard_normal():
    noise = draw_noise(0, "noise", range(4), (4, 64, 64))
    assert abs(noise.mean().item()) < 3 / noise.numel() ** 0.5
    assert abs(noise.var().item() - 1) < 3 * (2 / noise.numel()) ** 0.5


def test_offset_noise_moves_whole_channels_of_each_sample():
    noise = draw_noise(0, "noise", range(3), (4, 5, 6))
    shift = draw_offset(0, range(3), 4)
    assert shift.shape == (3, 4, 1, 1)
    assert len(shift.unique()) == 12
    torch.testing.assert_close(offset(noise, shift, 0.1) - noise, (0.1 * shift).expand(3, 4, 5, 6), rtol=0, atol=1e-6)
    assert torch.equal(draw_offset(0, [2], 4), shift[2:])
    assert torch.equal(offset(noise, shift, 0.0), noise)


def test_offset_noise_is_as_strong_as_its_formulas_say():
    noise = offset(draw_noise(0, "noise", range(300), (4, 8, 8)), draw_offset(0, range(300), 4), 0.5)
    assert noise.std().item() == pytest.approx((1 + 0.5**2) ** 0.5, rel=0.03)
    assert noise.mean(dim=(2, 3)).std().item() == pytest.approx((1 / 64 + 0.5**2) ** 0.5, rel=0.05)


def test_adaptive_strength_follows_the_channels_of_the_picture():
    latents = torch.tensor([1.0, -2.0, 0.0, 0.5]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    assert adaptive_strength(latents, 0.05, 0.1).flatten().tolist() == pytest.approx([0.15, 0.25, 0.05, 0.1])
    assert adaptive_strength(latents, 0.1, -0.1).flatten().tolist() == pytest.approx([0.0, 0.0, 0.1, 0.05])


def test_pyramid_noise_has_the_variance_of_noise_in_every_sample():
    noise = pyramid(draw_noise(0, "noise", range(5), (4, 16, 24)), 0, range(5), 0.6)
    assert noise.shape == (5, 4, 16, 24)
    torch.testing.assert_close(noise.flatten(1).std(dim=1), torch.ones(5))


@settings(max_examples=5, deadline=None)
@given(cut=st.integers(1, 4))
def test_pyramid_noise_does_not_depend_on_how_the_positions_are_cut_into_batches(cut):
    base, positions = draw_noise(0, "noise", range(5), (4, 8, 8)), range(5)
    parts = [pyramid(base[:cut], 0, positions[:cut], 0.5), pyramid(base[cut:], 0, positions[cut:], 0.5)]
    assert torch.equal(torch.cat(parts), pyramid(base, 0, positions, 0.5))


def test_pyramid_noise_adds_slow_patterns_alone():
    """Neighbours become alike, far points hardly; and without discount left, it is the noise itself, scaled."""
    base = draw_noise(0, "noise", range(64), (1, 32, 32))

    def likeness(noise: torch.Tensor, distance: int) -> float:
        return (noise[..., distance:] * noise[..., :-distance]).mean().item()

    noise = pyramid(base, 0, range(64), 0.8)
    assert abs(likeness(base, 1)) < 0.02
    assert likeness(noise, 1) > 0.2
    assert likeness(noise, 1) > likeness(noise, 8) > likeness(noise, 24)
    torch.testing.assert_close(pyramid(base, 0, range(64), 1e-9), base / base.flatten(1).std(dim=1).view(-1, 1, 1, 1))


def test_a_pyramid_is_the_sum_of_its_levels():
    """By hand, for a sample whose ratio is 2.854: levels of 22 x 14, 7 x 4, 2 x 1, and then no more, though there might be ten."""
    base = draw_noise(0, "noise", [5], (4, 64, 40))
    rng = generator(0, "pyramid-noise", 5)
    assert rng.uniform(2.0, 4.0) == pytest.approx(2.854, abs=5e-4)
    total = base.clone()
    for level, size in enumerate([(22, 14), (7, 4), (2, 1)], start=1):
        drawn = torch.from_numpy(rng.standard_normal((1, 4, *size), dtype=np.float32))
        total += 0.7**level * torch.nn.functional.interpolate(drawn, size=(64, 40), mode="bilinear")
    torch.testing.assert_close(pyramid(base, 0, [5], 0.7), total / total.std())
    assert not torch.equal(pyramid(base, 0, [5], 0.7, levels=2), pyramid(base, 0, [5], 0.7))


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 1, 8), (4, 3, 2)])
def test_pyramids_of_tiny_pictures_are_finite(shape):
    assert pyramid(draw_noise(0, "noise", range(3), shape), 0, range(3), 0.9).isfinite().all()


def test_input_perturbation_leaves_pure_noise_alone():
    noise, other = draw_noise(0, "noise", range(2), (4, 2, 2)), draw_noise(0, "perturbation", range(2), (4, 2, 2))
    alpha, _ = sdxl_schedule(zero_terminal_snr=True).at(torch.tensor([998, 999]))
    both = perturbed(noise, other, 0.1, alpha)
    torch.testing.assert_close(both[0], noise[0] + 0.1 * other[0])
    assert torch.equal(both[1], noise[1])
    assert both.dtype == torch.float32


def pair_distance(latents: torch.Tensor, noise: torch.Tensor) -> float:
    return (latents - noise).square().sum().item()


def test_immiscible_pairing_is_a_permutation_that_is_never_farther():
    latents, noise = draw_noise(0, "picture", range(16), (4, 3, 3)), draw_noise(0, "noise", range(16), (4, 3, 3))
    paired = immiscible(latents, noise)
    assert sorted(paired[:, 0, 0, 0].tolist()) == sorted(noise[:, 0, 0, 0].tolist())
    assert pair_distance(latents, paired) < pair_distance(latents, noise)
    for a in range(16):
        for b in range(a):
            swapped = paired.clone()
            swapped[[a, b]] = paired[[b, a]]
            assert pair_distance(latents, paired) <= pair_distance(latents, swapped) + 1e-4


def test_immiscible_pairing_of_one_picture_is_its_noise():
    noise = draw_noise(0, "noise", [0], (4, 2, 2))
    assert torch.equal(immiscible(torch.ones(1, 4, 2, 2), noise), noise)


def test_immiscible_pairing_leaves_the_distribution_of_the_noise_alone():
    latents = draw_noise(0, "picture", range(8), (1, 2, 2))
    paired = torch.stack([immiscible(latents, draw_noise(step, "noise", range(8), (1, 2, 2))) for step in range(300)])
    assert abs(paired.mean().item()) < 0.03
    assert paired.std().item() == pytest.approx(1, abs=0.03)
