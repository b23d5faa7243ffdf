from decimal import Decimal, localcontext

import pytest
import torch

from aquatint.diffusion.schedule import NUM_TIMESTEPS, Schedule, add_noise, rescale_zero_terminal_snr, sdxl_betas, sdxl_schedule

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
BOTH = pytest.mark.parametrize("schedule", [PLAIN, ZERO_TERMINAL], ids=["plain", "zero_terminal_snr"])


def exact_alpha_bar(zero_terminal_snr: bool) -> list[Decimal]:
    """The definition, with 40 digits."""
    with localcontext(prec=40):
        first, last = Decimal("0.00085").sqrt(), Decimal("0.012").sqrt()
        alpha_bar = [1 - (first + (last - first) * t / 999) ** 2 for t in range(NUM_TIMESTEPS)]
        for t in range(1, NUM_TIMESTEPS):
            alpha_bar[t] *= alpha_bar[t - 1]
        if zero_terminal_snr:
            roots = [value.sqrt() for value in alpha_bar]
            alpha_bar = [((root - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2 for root in roots]
        return alpha_bar


@pytest.mark.parametrize(
    ("timestep", "alpha_bar", "ve_sigma", "snr"),
    [
        (0, 0.99915, 0.0291671586, 1175.470588),
        (100, 0.89422348, 0.34393123, 8.45389371),
        (250, 0.67379263, 0.69579894, 2.06553462),
        (500, 0.27633268, 1.61827883, 0.381850441),
        (750, 0.056169848, 4.09916405, 0.0595126654),
        (999, 0.00466009851, 14.61464123, 0.00468191671),
    ],
)
def test_sdxl_table_has_its_published_values(timestep, alpha_bar, ve_sigma, snr):
    assert PLAIN.alphas[timestep].item() ** 2 == pytest.approx(alpha_bar, rel=1e-6)
    assert PLAIN.ve_sigmas[timestep].item() == pytest.approx(ve_sigma, rel=1e-6)
    assert PLAIN.snr[timestep].item() == pytest.approx(snr, rel=1e-6)


@pytest.mark.parametrize(
    ("timestep", "ve_sigma"),
    [(0, 0.02916716), (100, 0.35735026), (500, 1.77455747), (750, 5.43034295), (900, 18.35191927), (998, 2254.23798)],
)
def test_zero_terminal_table_has_its_published_values(timestep, ve_sigma):
    assert ZERO_TERMINAL.ve_sigmas[timestep].item() == pytest.approx(ve_sigma, rel=1e-6)


def test_zero_terminal_table_ends_in_exactly_nothing_but_noise():
    assert ZERO_TERMINAL.alphas[-1].item() == 0.0
    assert ZERO_TERMINAL.sigmas[-1].item() == 1.0
    assert ZERO_TERMINAL.snr[-1].item() == 0.0
    assert ZERO_TERMINAL.ve_sigmas[-1].item() == float("inf")
    assert ZERO_TERMINAL.alphas[-2].item() ** 2 == pytest.approx(1.9678880566e-7, rel=1e-6)


def test_zero_terminal_betas_have_their_published_values():
    alpha_bar = ZERO_TERMINAL.alphas.square()
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    assert betas[-2].item() == pytest.approx(0.7511370, rel=1e-6)
    assert betas[-1].item() == 1.0


def test_rescaling_keeps_the_first_timestep_and_stretches_the_rest():
    torch.testing.assert_close(ZERO_TERMINAL.alphas[0], PLAIN.alphas[0], rtol=1e-14, atol=0)
    ratio = ZERO_TERMINAL.ve_sigmas / PLAIN.ve_sigmas
    assert [ratio[t].item() for t in (500, 750, 900)] == pytest.approx([1.09657, 1.32474, 2.19873], rel=1e-5)


def test_share_of_timesteps_beyond_the_plain_schedule():
    shares = [(ZERO_TERMINAL.ve_sigmas > limit).double().mean().item() for limit in (14.61464123, 29.2, 100.0)]
    assert shares == pytest.approx([0.120, 0.067, 0.022], abs=1e-9)


def test_first_timesteps_below_snr_5_and_1():
    assert [int((PLAIN.snr < limit).nonzero()[0]) for limit in (5, 1)] == [147, 354]


def test_betas_are_linear_in_their_root():
    roots = sdxl_betas().sqrt()
    assert [roots[0].item() ** 2, roots[-1].item() ** 2] == pytest.approx([0.00085, 0.012], rel=1e-14)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(999), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("schedule", "zero_terminal_snr"), [(PLAIN, False), (ZERO_TERMINAL, True)])
def test_tables_keep_thirteen_digits(schedule, zero_terminal_snr):
    exact = exact_alpha_bar(zero_terminal_snr)
    alphas = torch.tensor([float(value.sqrt()) for value in exact], dtype=torch.float64)
    sigmas = torch.tensor([float((1 - value).sqrt()) for value in exact], dtype=torch.float64)
    torch.testing.assert_close(schedule.alphas, alphas, rtol=1e-13, atol=0)
    torch.testing.assert_close(schedule.sigmas, sigmas, rtol=1e-13, atol=0)


@BOTH
def test_picture_and_noise_share_out_a_variance_of_one(schedule):
    total = schedule.alphas.square() + schedule.sigmas.square()
    torch.testing.assert_close(total, torch.ones(NUM_TIMESTEPS, dtype=torch.float64), rtol=0, atol=1e-15)


@BOTH
def test_noise_grows_at_every_timestep(schedule):
    assert (schedule.ve_sigmas[1:] > schedule.ve_sigmas[:-1]).all()
    assert (schedule.alphas.diff() < 0).all()
    assert (schedule.sigmas.diff() > 0).all()


@pytest.mark.parametrize("ending", [0.0, 4.8973451890853435e-08, 2.0**-24, 2.5e-9], ids=["zero", "comfy", "diffusers", "nai"])
def test_rescaling_twice_is_refused_whatever_stands_for_zero(ending):
    alpha_bar = ZERO_TERMINAL.alphas.square()
    alpha_bar[-1] = ending
    with pytest.raises(ValueError, match="zero terminal SNR already"):
        rescale_zero_terminal_snr(alpha_bar)


def test_at_gathers_float32_columns_that_broadcast_over_latents():
    alpha, sigma = ZERO_TERMINAL.at(torch.tensor([0, 999, 500]))
    assert alpha.shape == sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.flatten().tolist() == ZERO_TERMINAL.alphas[[0, 999, 500]].float().tolist()
    assert sigma.flatten().tolist() == ZERO_TERMINAL.sigmas[[0, 999, 500]].float().tolist()


def test_all_thousand_noise_levels_stay_distinct_in_float32():
    for schedule in (PLAIN, ZERO_TERMINAL):
        assert len(schedule.sigmas.float().unique()) == NUM_TIMESTEPS
        assert len(schedule.alphas.float().unique()) == NUM_TIMESTEPS


def test_add_noise_matches_its_vector_and_computes_in_float32():
    latents, noise = torch.full((1, 4, 2, 2), 1.0, dtype=torch.bfloat16), torch.full((1, 4, 2, 2), -0.5, dtype=torch.bfloat16)
    noisy = add_noise(latents, noise, *PLAIN.at(torch.tensor([500])))
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy, torch.full_like(noisy, 0.10033036), rtol=1e-6, atol=0)


def test_add_noise_at_the_zero_terminal_step_is_the_noise_itself():
    latents, noise = torch.randn(2, 1, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(add_noise(latents, noise, *ZERO_TERMINAL.at(torch.tensor([999]))), noise)


def test_a_schedule_cannot_be_changed():
    with pytest.raises(AttributeError):
        Schedule(PLAIN.alphas, PLAIN.sigmas, False).alphas = PLAIN.sigmas
