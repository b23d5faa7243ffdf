import pytest
import torch

from aquatint.diffusion.standardise import LatentConvs, fold_standardisation
from aquatint.models.sdxl.process import RAW_MEAN, RAW_STD

SCALE = 0.13025
MEAN, STD = torch.tensor(RAW_MEAN, dtype=torch.float64), torch.tensor(RAW_STD, dtype=torch.float64)


def convs(dtype: torch.dtype = torch.float64) -> LatentConvs:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 8, 1, 1), (8,), (4, 4, 1, 1), (4,))
    return LatentConvs(*(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes))


def encode(convs: LatentConvs, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, log_variance = torch.nn.functional.conv2d(features, convs.quant_weight, convs.quant_bias).chunk(2, dim=1)
    return mean, (log_variance / 2).exp()


def decode(convs: LatentConvs, latents: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.conv2d(latents, convs.post_quant_weight, convs.post_quant_bias)


def test_scaled_latents_become_standardised_ones():
    features = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, spread = encode(convs(), features)
    new_mean, new_spread = encode(fold_standardisation(convs(), MEAN, STD, SCALE), features)
    shape = (1, 4, 1, 1)
    torch.testing.assert_close(SCALE * new_mean, (mean - MEAN.view(shape)) / STD.view(shape), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(SCALE * new_spread, spread / STD.view(shape), rtol=1e-12, atol=1e-12)


def test_pictures_stay_as_they_were():
    features = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    folded = fold_standardisation(convs(), MEAN, STD, SCALE)
    torch.testing.assert_close(
        decode(folded, encode(folded, features)[0]), decode(convs(), encode(convs(), features)[0]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_weights_keep_their_number_format(dtype):
    folded = fold_standardisation(convs(dtype), MEAN, STD, SCALE)
    assert all(tensor.dtype == dtype for tensor in folded)
    assert [tuple(tensor.shape) for tensor in folded] == [tuple(tensor.shape) for tensor in convs()]


def test_statistics_that_are_so_already_change_nothing():
    folded = fold_standardisation(convs(), torch.zeros(4), torch.full((4,), 1 / SCALE), SCALE)
    for new, old in zip(folded, convs(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)
