import pytest
import torch
from torch import nn

from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.model import VaeEncoder, decode_latents, predict
from aquatint.models.sdxl.process import VAE_SCALING_FACTOR


class RecordingUnet(nn.Module):
    """Notes how it was called and answers with its input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, sample, timesteps, **others):
        self.called = {"sample": sample, "timesteps": timesteps, **others}
        return (sample,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_what_may_be_rounded_is_cast(dtype):
    unet = RecordingUnet(dtype)
    output = predict(
        unet, torch.ones(1, 4, 2, 2), torch.tensor([999]), torch.ones(1, 77, 8), torch.ones(1, 4), torch.tensor([[1025, 1, 2, 3, 4, 3007]])
    )
    conditions = unet.called["added_cond_kwargs"]
    assert {unet.called[name].dtype for name in ("sample", "encoder_hidden_states")} | {conditions["text_embeds"].dtype} == {dtype}
    assert unet.called["timesteps"].tolist() == [999]
    assert unet.called["timesteps"].dtype == torch.int64
    assert conditions["time_ids"].tolist() == [[1025, 1, 2, 3, 4, 3007]]
    assert conditions["time_ids"].dtype == torch.float32
    assert output.dtype == torch.float32


def test_a_bf16_unet_tells_neighbouring_sizes_apart(tiny_base):
    unet = open_base(tiny_base).load_unet(torch.bfloat16)
    noisy, embeds, pooled = torch.ones(2, 4, 8, 8), torch.ones(2, 77, 80), torch.ones(2, 48)
    with torch.no_grad():
        near, far = predict(unet, noisy, torch.tensor([999, 998]), embeds, pooled, torch.tensor([[1025.0] * 6, [1024.0] * 6]))
    assert not torch.equal(near, far)


@pytest.fixture(scope="module")
def vae(tiny_base):
    return open_base(tiny_base).load_vae()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_encoder_gives_raw_mean_and_deviation(vae, images):
    result = VaeEncoder(vae, digest="d").encode(images)
    expected = vae.encode(images).latent_dist
    assert result.shape == (2, 8, 8, 4)
    torch.testing.assert_close(result[:, :4], expected.mean)
    torch.testing.assert_close(result[:, 4:], expected.std)


def test_the_encoder_works_in_the_dtype_of_its_weights_and_answers_in_float32(tiny_base, images):
    encoder = open_base(tiny_base).vae_encoder("cpu", "bfloat16")
    result = encoder.encode(images)
    assert (encoder.vae.dtype, result.dtype, result.requires_grad) == (torch.bfloat16, torch.float32, False)
    assert encoder.digest == open_base(tiny_base).digest("vae_encoder")


def test_values_that_are_not_finite_are_passed_on(vae, images):
    broken = images.clone()
    broken[1, 0, 0, 0] = torch.nan
    result = VaeEncoder(vae, digest="d").encode(broken)
    assert result[0].isfinite().all()
    assert result[1].isnan().any()


def test_decoding_undoes_the_scaling_and_stays_in_range(vae):
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = vae.decode(latents / VAE_SCALING_FACTOR).sample.clamp(-1, 1)
    decoded = decode_latents(vae, latents)
    assert (decoded.shape, decoded.dtype) == ((3, 3, 32, 32), torch.float32)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=1e-4)
