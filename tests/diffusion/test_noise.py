import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquatint.diffusion.noise import draw_noise
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
