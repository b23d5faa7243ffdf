import pytest
import torch

from aquatint.diffusion.guidance import guide, match_strength

POSITIVE = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_rescaling_matches_its_vector():
    guided = torch.tensor([2.0, 4.0, 8.0, 10.0]).view(1, 4, 1, 1)
    assert (POSITIVE.std() / guided.std()).item() == pytest.approx(0.35355339, rel=1e-6)
    negative = 2 * POSITIVE - guided  # so that scale 2 arrives at `guided`
    rescaled = guide(POSITIVE, negative, 2.0, 0.7)
    assert rescaled.flatten().tolist() == pytest.approx([1.09497475, 2.18994949, 4.37989899, 5.47487373], rel=1e-6)


def test_scale_moves_away_from_the_negative():
    positive, negative = pair()
    torch.testing.assert_close(guide(positive, negative, 1.0, 0.0), positive)
    torch.testing.assert_close(guide(positive, negative, 0.0, 0.0), negative)
    torch.testing.assert_close(guide(positive, negative, 5.0, 0.0), positive + 4 * (positive - negative))


def test_full_rescaling_gives_every_sample_the_strength_of_its_positive():
    positive, negative = pair()
    rescaled = guide(positive, negative, 5.0, 1.0)
    torch.testing.assert_close(rescaled.flatten(1).std(dim=1), positive.flatten(1).std(dim=1))


def test_rescaling_does_nothing_where_guidance_does_nothing():
    positive, _ = pair()
    torch.testing.assert_close(guide(positive, positive, 7.0, 0.7), positive)


def test_samples_are_rescaled_on_their_own():
    positive, negative = pair()
    together = match_strength(negative, positive)
    alone = torch.cat([match_strength(negative[i : i + 1], positive[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
