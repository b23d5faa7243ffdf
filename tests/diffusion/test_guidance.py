import torch

from aquatint.diffusion.guidance import guide, match_strength


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)))


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
