"""The numbers that an implementation of these methods must give, computed apart from this code, in the order of the methods:

1 SDXL's schedule · 2 zero terminal SNR, resolution, latent statistics · 3 parameterisations · 4 loss weights · 5 noise · 6 timesteps ·
12 metrics and inference.
"""

import math

import numpy as np
import pytest
import torch

from aquatint.diffusion import timesteps as timesteps_module
from aquatint.diffusion.densities import density, mode_quantile, sigma_cdf, time_cdf
from aquatint.diffusion.grids import karras_sigmas, leading_timesteps, sampling_timesteps
from aquatint.diffusion.guidance import guide
from aquatint.diffusion.importance import importance_weights, loss_aware
from aquatint.diffusion.loss import huber_c, per_sample_loss
from aquatint.diffusion.metrics import Moments, cmmd, frechet_distance
from aquatint.diffusion.noise import immiscible, offset, perturbed
from aquatint.diffusion.parameterization import edm_preconditioning, target, to_x0
from aquatint.diffusion.schedule import (
    STAND_INS,
    add_noise,
    reindexed,
    rescale_zero_terminal_snr,
    resolution_factor,
    sdxl_betas,
    sdxl_schedule,
    shifted,
)
from aquatint.diffusion.standardise import LatentConvs, fold_standardisation
from aquatint.diffusion.timesteps import lattice_uniform, midpoint_timesteps, stratified_uniform, trailing_timesteps
from aquatint.diffusion.uncertainty import uncertain_loss
from aquatint.diffusion.weighting import cosmap, error_ratio, loss_weights
from aquatint.models.sdxl.process import RAW_MEAN, RAW_STD
from tests.diffusion.test_timesteps import Fixed

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
COMFYUI = ZERO_TERMINAL.ending_at(STAND_INS["comfyui"])


def near(*values, rel=1e-6, abs=0.0):
    return pytest.approx([*values], rel=rel, abs=abs)


def scalar(value):
    return torch.full((1, 1, 1, 1), value)


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


# 1


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
def test_1_schedule_table(timestep, alpha_bar, ve_sigma, snr):
    row = [PLAIN.alphas[timestep].item() ** 2, PLAIN.ve_sigmas[timestep].item(), PLAIN.snr[timestep].item()]
    assert row == near(alpha_bar, ve_sigma, snr)


def test_1_schedule_first_timesteps_below_snr_5_and_1():
    assert [int((PLAIN.snr < limit).nonzero()[0]) for limit in (5, 1)] == [147, 354]


def test_1_schedule_is_neither_of_the_tables_that_it_is_taken_for():
    """Betas that are linear themselves, and a float32 and a float16 cumulative product."""
    linear = torch.cumprod(1 - torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64), 0)
    assert ((1 - linear) / linear).sqrt()[-1].item() == pytest.approx(25.146, abs=5e-4)
    exact = PLAIN.alphas.square()
    assert (torch.cumprod(1 - sdxl_betas().float(), 0) / exact - 1).abs().max() < 2.2e-6
    half = exact.half().double()
    assert ((1 - half) / half).sqrt()[[-1, 0]].tolist() == near(14.6123, 0.03127, rel=2e-4)


def test_1_leading_spacing_never_starts_from_the_noisiest_timestep():
    assert [leading_timesteps(10)[0], leading_timesteps(28)[0]] == [901, 946]


# 2


def test_2_1_zero_terminal_snr_table():
    assert ZERO_TERMINAL.ve_sigmas[[0, 100, 500, 750, 900, 998]].tolist() == near(
        0.02916716, 0.35735026, 1.77455747, 5.43034295, 18.35191927, 2254.23798
    )
    assert ZERO_TERMINAL.alphas[998].item() ** 2 == pytest.approx(1.9678880566e-7, rel=1e-6)
    ratio = ZERO_TERMINAL.ve_sigmas / PLAIN.ve_sigmas
    assert ratio[[500, 750, 900]].tolist() == near(1.09657, 1.32474, 2.19873, rel=1e-5)


def test_2_1_zero_terminal_snr_ends_in_exactly_nothing_but_noise():
    assert ZERO_TERMINAL.alphas[-1].item() == 0.0
    assert ZERO_TERMINAL.sigmas[-1].item() == 1.0
    assert ZERO_TERMINAL.snr[-1].item() == 0.0
    assert ZERO_TERMINAL.ve_sigmas[-1].item() == math.inf


def test_2_1_zero_terminal_snr_betas():
    alpha_bar = ZERO_TERMINAL.alphas.square()
    betas = 1 - alpha_bar[1:] / alpha_bar[:-1]
    assert betas[-2].item() == pytest.approx(0.7511370, rel=1e-6)
    assert betas[-1].item() == 1.0


def test_2_1_zero_terminal_snr_share_of_timesteps_beyond_the_plain_schedule():
    shares = [(ZERO_TERMINAL.ve_sigmas > limit).double().mean().item() for limit in (14.61464123, 29.2, 100.0)]
    assert shares == near(0.120, 0.067, 0.022, abs=1e-9)


def test_2_1_stand_ins_for_infinity():
    alpha_bars = {name: ZERO_TERMINAL.ending_at(ve_sigma).alphas[-1].item() ** 2 for name, ve_sigma in STAND_INS.items()}
    assert alpha_bars["comfyui"] == pytest.approx(4.8973451890853435e-08, rel=1e-6)
    assert alpha_bars["diffusers"] == pytest.approx(2**-24, rel=1e-6)
    assert alpha_bars["novelai"] == pytest.approx(2.5e-9, rel=1e-6)


def test_2_1_rescaling_twice_would_give_another_table():
    alpha_bar = COMFYUI.alphas.square()
    with pytest.raises(ValueError, match="zero terminal SNR already"):
        rescale_zero_terminal_snr(alpha_bar)
    roots = alpha_bar.sqrt()
    twice = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
    assert ((1 - twice) / twice).sqrt()[998].item() == pytest.approx(4497, abs=1)


def test_2_2_resolution():
    sizes = [(1024, 1024), (832, 1216), (1536, 1536), (2048, 2048)]
    assert [resolution_factor(*size) for size in sizes] == near(1, 0.98226460, 1.5, 2)
    assert [reindexed(PLAIN, k).ve_sigmas[-1].item() for k in (1.5, 2)] == near(21.92196, 29.22928)
    doubled = reindexed(PLAIN, 2)
    assert [doubled.ve_sigmas[500].item(), doubled.alphas[500].item() ** 2] == near(3.23655765, 0.08714365)
    assert (PLAIN.snr.log() - doubled.snr.log()).tolist() == pytest.approx([2 * math.log(2)] * 1000)


def test_2_3_latent_statistics():
    mean, std = torch.tensor(RAW_MEAN), torch.tensor(RAW_STD)
    assert (0.13025 * mean).tolist() == near(-0.2159, 0.2457, -0.1801, 0.3276, rel=2e-4, abs=5e-5)
    assert (0.13025 * std).tolist() == near(1.10617, 0.76876, 0.85311, 0.68119, rel=1e-5)
    mean_square = (0.13025**2 * (std.square() + mean.square())).mean().item()
    assert math.sqrt(mean_square) == pytest.approx(0.9018, abs=5e-5)
    convs = LatentConvs(torch.eye(8)[:, :, None, None], torch.zeros(8), torch.eye(4)[:, :, None, None], torch.zeros(4))
    folded = fold_standardisation(convs, mean, std, 0.13025)
    assert (-folded.quant_bias[4:]).tolist() == near(0.20181, -0.52595, -0.31773, -0.76781, rel=0, abs=5e-6)


# 3


def test_3_epsilon_and_v_at_timestep_500():
    alpha, sigma = PLAIN.at(torch.tensor([500]))
    latents, noise = scalar(1.0), scalar(-0.5)
    assert [alpha.item(), sigma.item()] == near(0.52567355, 0.85068638)
    noisy = add_noise(latents, noise, alpha, sigma).item()
    assert noisy == pytest.approx(0.10033036, rel=1e-6)
    assert noisy * math.sqrt(1 + PLAIN.ve_sigmas[500].item() ** 2) == pytest.approx(0.19086059, rel=1e-6)
    assert target("epsilon", latents, noise, alpha, sigma).item() == -0.5
    assert target("v_prediction", latents, noise, alpha, sigma).item() == pytest.approx(-1.11352316, rel=1e-6)


def test_3_edm():
    constants = edm_preconditioning(float64(2.0), 0.5)
    assert [value.item() for value in constants] == near(0.05882353, 0.48507125, 0.48507125, 0.17328680, 4.25)
    alpha = scalar(1 / math.sqrt(5))
    assert target("edm", scalar(1.0), scalar(-0.5), alpha, 2 * alpha, sigma_data=0.5).item() == pytest.approx(2.06155281, rel=1e-6)


def test_3_flow():
    alpha, sigma = scalar(0.75), scalar(0.25)
    assert add_noise(scalar(1.0), scalar(-0.5), alpha, sigma).item() == 0.625
    assert target("flow", scalar(1.0), scalar(-0.5), alpha, sigma).item() == -1.5
    assert to_x0("flow", scalar(-1.5), scalar(0.625), alpha, sigma).item() == 1.0


def test_3_flow_times_that_sdxl_was_trained_for():
    highest = PLAIN.ve_sigmas[-1].item()
    assert highest / (1 + highest) == pytest.approx(0.93596, abs=5e-6)
    times = float64(0.1, 0.25, 0.5, 0.75, 0.9)
    assert PLAIN.timesteps_of(times / (1 - times)).tolist() == near(12.9, 95.3, 353.9, 673.2, 914.2, abs=0.05)


# 4


def weights(weighting, prediction="v_prediction", snr=PLAIN.snr, gamma=5.0, floor=0.0, **options):
    return loss_weights(weighting, prediction, snr, gamma=gamma, floor=floor, **options)


def test_4_min_snr():
    over_epsilon, over_v = weights("min_snr", "epsilon"), weights("min_snr")
    assert over_epsilon[[0, 100, 500, 999]].tolist() == near(0.00425362, 0.59144344, 1, 1, rel=2e-6)
    assert over_v[[100, 500, 999]].tolist() == near(0.52888261, 0.27633268, 0.00466010)
    assert over_v[0].item() == pytest.approx(0.00425, abs=5e-6)
    assert [over_epsilon.mean().item(), over_v.mean().item()] == near(0.91657, 0.29433, abs=5e-6)


def test_4_min_snr_without_floor_never_trains_the_zero_terminal_step():
    table = weights("min_snr", snr=ZERO_TERMINAL.snr)
    assert table[998].item() == pytest.approx(1.9679e-7, rel=1e-4)
    assert table[999].item() == 0.0
    assert table.mean().item() == pytest.approx(0.27761, abs=5e-6)
    assert (table[900:].sum() / table.sum()).item() == pytest.approx(0.00032, abs=1e-5)


def test_4_soft_min_snr():
    assert weights("soft_min_snr")[[0, 100, 500, 999]].tolist() == near(0.00423200, 0.33232888, 0.25672646, 0.00465574)


def test_4_soft_min_snr_on_the_output_of_a_preconditioned_net():
    """k-diffusion's weight 1 / (ve_sigma^2 + sigma_data^2) on x0, at ve_sigma 2."""
    snr = float64(0.25)
    for sigma_data, expected in [(1.0, 0.16), (0.5, 0.05536332)]:
        table = weights("soft_min_snr", "edm", snr, gamma=sigma_data**-2, sigma_data=sigma_data)
        assert table.item() == pytest.approx(expected, rel=1e-6)


def test_4_clamped_v():
    table = weights("clamped_v", snr=ZERO_TERMINAL.snr)
    assert table[100].item() == pytest.approx(0.56619358, rel=1e-6)
    assert int((table == 1).nonzero()[0]) == 161
    assert table[999].item() == 1
    assert table.mean().item() == pytest.approx(0.91287, abs=5e-6)


def test_4_cosmap():
    times = float64(0.1, 0.25, 0.5, 0.9)
    snr = ((1 - times) / times).square()
    over_flow = cosmap(snr) / error_ratio("flow", snr)
    assert over_flow.tolist() == near(0.77636558, 1.01859164, 1.27323954, 0.77636558)


def test_4_huber():
    difference = torch.tensor([0.01, 1.0, 3.0]).view(3, 1, 1, 1)
    zero = torch.zeros_like(difference)
    expected = [9.9751242e-5, 0.18099751, 0.58033324]
    assert per_sample_loss("huber", difference, zero, c=0.1).tolist() == near(*expected)
    assert per_sample_loss("smooth_l1", difference, zero, c=0.1).tolist() == near(*(value / 0.1 for value in expected))


def test_4_huber_schedules():
    places = [0, 500, 999]
    assert huber_c("exponential", PLAIN.ve_sigmas, 0.1)[places].tolist() == near(1, 0.31622777, 0.10023052)
    assert huber_c("snr", PLAIN.ve_sigmas, 0.1)[places].tolist() == near(0.94970989, 0.23128367, 0.10369129)


def test_4_learned_uncertainty():
    u = torch.tensor(0.25).log()
    assert uncertain_loss(torch.tensor(0.25), u).item() == pytest.approx(-0.38629436, rel=1e-6)


# 5


@pytest.mark.parametrize(
    ("strength", "pixel_std", "mean_std"),
    [(0.0, 1.0, 0.0078125), (0.0357, 1.00063704, 0.03654484), (0.05, 1.00124922, 0.05060667), (0.1, 1.00498756, 0.10030471)],
)
def test_5_offset_noise(strength, pixel_std, mean_std):
    """On noise whose moments are exactly those of unit noise, of 128 x 128: signs, and channel means of 1/128, all uncorrelated."""
    signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    pixels = signs.repeat(128, 64).expand(4, 1, 128, 128)
    means = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1) / 128
    shift = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(4, 1, 1, 1)
    noise = offset(math.sqrt(1 - 1 / 128**2) * pixels + means, shift, strength)
    assert noise.square().mean().sqrt().item() == pytest.approx(pixel_std, rel=1e-6)
    assert noise.mean(dim=(1, 2, 3)).square().mean().sqrt().item() == pytest.approx(mean_std, rel=1e-6)


def test_5_immiscible():
    latents, noise = torch.tensor([0.0, 10.0]).view(2, 1, 1, 1), torch.tensor([9.0, 1.0]).view(2, 1, 1, 1)
    assert immiscible(latents, noise).flatten().tolist() == [1.0, 9.0]


def test_5_input_perturbation():
    noise, other = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, sigma = ZERO_TERMINAL.at(torch.tensor([10, 500, 999]))
    latents = torch.ones_like(noise)
    seen = add_noise(latents, perturbed(noise, other, 0.1, alpha), alpha, sigma)
    assert not torch.equal(seen[0], add_noise(latents, noise, alpha, sigma)[0])
    assert torch.equal(target("epsilon", latents, noise, alpha, sigma), noise)
    assert torch.equal(seen[2], noise[2])


# 6


def test_6_logit_normal():
    quantiles = np.array([0.161806, 0.337492, 0.5, 0.662508, 0.838194])
    assert time_cdf("logit_normal", quantiles).tolist() == near(0.05, 0.25, 0.5, 0.75, 0.95, rel=0, abs=2e-6)
    step = 1e-4
    for t, expected in [(0.1, 0.39657470), (0.5, 1.59576912)]:
        low, high = time_cdf("logit_normal", np.array([t - step, t + step]))
        assert (high - low) / (2 * step) == pytest.approx(expected, rel=1e-6)
    assert 1 - time_cdf("logit_normal", np.array([0.99]))[0] == pytest.approx(2.2e-6, abs=5e-8)


def test_6_shift():
    assert shifted(float64(0.1, 0.25, 0.5, 0.75, 0.9), 3).tolist() == near(0.25, 0.5, 0.75, 0.9, 0.96428571)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(shifted(shifted(t, 3), 2), shifted(t, 6), rtol=1e-12, atol=0)


def test_6_mode():
    assert mode_quantile(np.array([0.1, 0.5, 0.9]), 1.29).tolist() == near(0.80256855, 0.5, 0.19743145)
    assert time_cdf("mode", np.array([0.80256855, 0.5, 0.19743145])).tolist() == near(0.9, 0.5, 0.1)


def test_6_stratified_draws(monkeypatch):
    monkeypatch.setattr(timesteps_module, "generator", lambda *key: Fixed(0.5))
    uniform = stratified_uniform(0, range(8), 8)
    assert uniform[0::2].tolist() == [0.0625, 0.3125, 0.5625, 0.8125]
    assert uniform[1::2].tolist() == [0.1875, 0.4375, 0.6875, 0.9375]


def test_6_lattice_draws(monkeypatch):
    monkeypatch.setattr(timesteps_module, "generator", lambda *key: Fixed(0.3))
    assert lattice_uniform(0, range(4), 4).tolist() == near(0.3, 0.55, 0.8, 0.05)


def test_6_karras_grid():
    ends = PLAIN.ve_sigmas[0].item(), PLAIN.ve_sigmas[-1].item()
    assert karras_sigmas(10, *ends).tolist() == near(
        14.614641, 9.102928, 5.478392, 3.168603, 1.749417, 0.914072, 0.446918, 0.201398, 0.08191, 0.029167, rel=1e-6, abs=5e-7
    )
    wide = karras_sigmas(1000, PLAIN.ve_sigmas[0].item(), STAND_INS["novelai"])
    assert [(wide > 14.6).mean(), (wide > 100).mean()] == near(0.754, 0.622, rel=0, abs=1e-9)


def test_6_edm_log_normal():
    quantiles = np.array([0.041843, 0.301194, 2.168042])
    assert sigma_cdf("log_normal", quantiles, mean=-1.2, std=1.2).tolist() == near(0.05, 0.5, 0.95, rel=0, abs=2e-6)


def test_6_loss_aware():
    history = np.array([[1.0], [4.0], [9.0]])
    base = np.full(3, 1 / 3)
    probabilities = loss_aware(history, base)
    assert probabilities.tolist() == near(0.07169048, 0.2857619, 0.64254762)
    weighted = importance_weights(probabilities, base) * history[:, 0]
    assert (probabilities * weighted).sum() == pytest.approx(4.6666667, rel=1e-8)


def test_6_uniform_draws_reach_the_last_timestep():
    assert density("uniform", ZERO_TERMINAL)[999] == pytest.approx(1 / 1000, rel=1e-9)


# 12


def test_12_validation_timesteps():
    assert midpoint_timesteps(8, terminal=False) == [62, 187, 312, 437, 562, 687, 812, 937]
    assert midpoint_timesteps(8, terminal=True) == [62, 187, 312, 437, 562, 687, 812, 937, 999]


def test_12_frechet_distance():
    one, other = Moments(np.zeros(3), np.eye(3)), Moments(np.array([1.0, 2.0, 0.0]), np.diag([1.0, 4.0, 1.0]))
    assert frechet_distance(one, other) == pytest.approx(6.0, rel=1e-12)


def test_12_cmmd():
    x, y = np.eye(2), np.array([[1.0, 0.0], [1.0, 0.0]])
    assert cmmd(x, y) == pytest.approx(4.97508313, rel=1e-8)
    assert cmmd(x, x) == 0


def test_12_trailing_timesteps():
    assert trailing_timesteps(10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert trailing_timesteps(28)[:4] == [999, 963, 928, 892]
    assert trailing_timesteps(28)[-1] == 35


def test_12_noise_levels_of_28_steps():
    trailing = COMFYUI.ve_sigmas[trailing_timesteps(28)]
    assert trailing[:6].tolist() == near(4518.76, 57.867, 27.170, 16.696, 11.598, 8.624, rel=5e-5)
    karras = COMFYUI.ve_sigmas.new_tensor(karras_sigmas(28, COMFYUI.ve_sigmas[0].item(), COMFYUI.ve_sigmas[-1].item()))
    assert [int((karras > 14.6).sum()), int((karras > 100).sum()), int((trailing > 14.6).sum())] == [19, 14, 4]
    assert sampling_timesteps("karras", COMFYUI, 28)[0] == 999


def test_12_guidance_rescale():
    positive = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    guided = torch.tensor([2.0, 4.0, 8.0, 10.0]).view(1, 4, 1, 1)
    assert (positive.std() / guided.std()).item() == pytest.approx(0.35355339, rel=1e-6)
    negative = 2 * positive - guided  # so that scale 2 arrives at `guided`
    rescaled = guide(positive, negative, 2.0, 0.7)
    assert rescaled.flatten().tolist() == near(1.09497475, 2.18994949, 4.37989899, 5.47487373)
