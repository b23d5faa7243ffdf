from decimal import Decimal, localcontext

import pytest
import torch

from aquatint.diffusion.schedule import (
    NUM_TIMESTEPS,
    STAND_INS,
    Schedule,
    add_noise,
    edm_schedule,
    flow_schedule,
    reindexed,
    rescale_zero_terminal_snr,
    sdxl_betas,
    sdxl_schedule,
    shifted,
)

PLAIN = sdxl_schedule(zero_terminal_snr=False)
ZERO_TERMINAL = sdxl_schedule(zero_terminal_snr=True)
FLOW = flow_schedule()
EDM = edm_schedule()
SHOWN = ZERO_TERMINAL.ending_at(STAND_INS["comfyui"])
VARIANCE_PRESERVING = pytest.mark.parametrize(
    "schedule",
    [PLAIN, ZERO_TERMINAL, SHOWN, EDM, reindexed(PLAIN, 2), reindexed(ZERO_TERMINAL, 2)],
    ids=["plain", "zero_terminal_snr", "stand_in", "edm", "reindexed", "reindexed_zero_terminal_snr"],
)
ALL = pytest.mark.parametrize(
    "schedule",
    [PLAIN, ZERO_TERMINAL, SHOWN, EDM, reindexed(ZERO_TERMINAL, 0.5), FLOW, flow_schedule(3.0)],
    ids=["plain", "zero_terminal_snr", "stand_in", "edm", "reindexed", "flow", "shifted_flow"],
)


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


def test_rescaling_keeps_the_first_timestep_and_stretches_the_rest():
    torch.testing.assert_close(ZERO_TERMINAL.alphas[0], PLAIN.alphas[0], rtol=1e-14, atol=0)
    assert (ZERO_TERMINAL.ve_sigmas / PLAIN.ve_sigmas)[1:].min() > 1


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


@VARIANCE_PRESERVING
def test_picture_and_noise_share_out_a_variance_of_one(schedule):
    total = schedule.alphas.square() + schedule.sigmas.square()
    torch.testing.assert_close(total, torch.ones(NUM_TIMESTEPS, dtype=torch.float64), rtol=0, atol=1e-15)


@ALL
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


@ALL
def test_whole_timesteps_are_looked_up_whatever_their_type(schedule):
    timesteps = torch.arange(NUM_TIMESTEPS)
    for kind in (torch.int64, torch.float32, torch.float64):
        alphas, sigmas = schedule.levels(timesteps.to(kind))
        torch.testing.assert_close(alphas, schedule.alphas, rtol=0, atol=1e-16)
        assert torch.equal(sigmas, schedule.sigmas)
        assert torch.equal(schedule.at(timesteps.to(kind))[1].flatten(), schedule.sigmas.float())


@VARIANCE_PRESERVING
def test_between_two_timesteps_the_logarithm_of_the_noise_is_interpolated(schedule):
    alpha, sigma = schedule.levels(torch.tensor([100.5], dtype=torch.float64))
    assert (sigma / alpha).item() == pytest.approx((schedule.ve_sigmas[100] * schedule.ve_sigmas[101]).sqrt().item(), rel=1e-12)
    assert (sigma.square() + alpha.square()).item() == pytest.approx(1, rel=1e-15)


def test_a_flow_is_interpolated_in_its_time():
    alpha, sigma = FLOW.levels(torch.tensor([249.5]))
    assert [alpha.item(), sigma.item()] == pytest.approx([0.7495, 0.2505], rel=1e-12)


def test_nothing_lies_between_a_finite_and_an_infinite_noise_level():
    with pytest.raises(ValueError, match="ending_at"):
        ZERO_TERMINAL.at(torch.tensor([10.5, 998.5]))
    assert SHOWN.ve_sigmas[998] < SHOWN.at(torch.tensor([998.5]))[1].item() / SHOWN.at(torch.tensor([998.5]))[0].item() < 4518


@ALL
def test_noise_levels_lead_back_to_their_timesteps(schedule):
    timesteps = torch.linspace(0, 998, 2996, dtype=torch.float64)
    alpha, sigma = schedule.levels(timesteps)
    torch.testing.assert_close(schedule.timesteps_of(sigma / alpha), timesteps, rtol=0, atol=1e-9)
    assert schedule.timesteps_of(schedule.ve_sigmas[[0, 999]]).tolist() == [0, 999]


def test_noise_levels_beyond_the_table_get_its_ends():
    assert PLAIN.timesteps_of(torch.tensor([0.0, 1e-9, 1e9, float("inf")])).tolist() == [0, 0, 999, 999]
    assert ZERO_TERMINAL.timesteps_of(torch.tensor([1e9, float("inf")])).tolist() == [998, 999]
    assert FLOW.timesteps_of(torch.tensor([0.0, float("inf")])).tolist() == [0, 999]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_timesteps_of_noise_levels_agree_with_diffusers():
    from diffusers import EulerDiscreteScheduler

    theirs = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ve_sigmas = torch.linspace(0.03, 14.6, 97, dtype=torch.float64)
    expected = theirs._sigma_to_t(ve_sigmas.numpy(), PLAIN.ve_sigmas.log().numpy())
    assert PLAIN.timesteps_of(ve_sigmas).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_a_stand_in_changes_the_last_level_alone():
    assert torch.equal(SHOWN.alphas[:-1], ZERO_TERMINAL.alphas[:-1])
    assert torch.equal(SHOWN.sigmas[:-1], ZERO_TERMINAL.sigmas[:-1])
    assert SHOWN.ve_sigmas[-1].item() == pytest.approx(4518.7637)
    assert not SHOWN.zero_terminal_snr


@pytest.mark.parametrize(("schedule", "ve_sigma"), [(PLAIN, 4096.0), (SHOWN, 4096.0), (FLOW, 4096.0)])
def test_only_infinity_has_a_stand_in(schedule, ve_sigma):
    with pytest.raises(ValueError, match="infinite"):
        schedule.ending_at(ve_sigma)


@pytest.mark.parametrize("ve_sigma", [14.6, 2254.0, float("inf"), float("nan")])
def test_a_stand_in_is_finite_and_the_largest(ve_sigma):
    with pytest.raises(ValueError, match="finite and above 2254"):
        ZERO_TERMINAL.ending_at(ve_sigma)


def test_a_flow_is_a_straight_line_that_ends_in_pure_noise():
    assert torch.equal(FLOW.alphas + FLOW.sigmas, torch.ones(1000, dtype=torch.float64))
    assert FLOW.zero_terminal_snr
    assert [FLOW.alphas[-1].item(), FLOW.sigmas[-1].item(), FLOW.snr[-1].item()] == [0, 1, 0]
    assert FLOW.sigmas[[0, 249]].tolist() == [0.001, 0.25]


@pytest.mark.parametrize("schedule", [FLOW, flow_schedule(3.0), reindexed(FLOW, 0.5)])
def test_a_flow_tells_the_unet_its_time_in_thousandths(schedule):
    told = schedule.unet_timesteps(torch.arange(1000))
    assert told.dtype == torch.float32
    torch.testing.assert_close(told, (1000 * schedule.sigmas).float())
    assert schedule.unet_timesteps(torch.tensor([998.5])).item() == pytest.approx((told[998] + told[999]).item() / 2)


def test_to_shift_a_flow_is_to_multiply_its_noise():
    both = flow_schedule(3.0)
    torch.testing.assert_close(both.ve_sigmas[:-1], 3 * FLOW.ve_sigmas[:-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(reindexed(FLOW, 3.0).sigmas, both.sigmas, rtol=0, atol=0)
    assert shifted(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0, 1]


def test_schedules_of_named_noise_tell_the_unet_a_quarter_of_its_logarithm():
    assert EDM.ve_sigmas[[0, 999]].tolist() == pytest.approx([0.002, 80])
    torch.testing.assert_close(EDM.unet_timesteps(torch.arange(1000)), (EDM.ve_sigmas.log() / 4).float())


@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_sdxl_is_told_the_timestep_itself(kind):
    timesteps = torch.tensor([0, 500, 999], dtype=kind)
    assert PLAIN.unet_timesteps(timesteps) is timesteps


def test_reindexing_by_one_changes_nothing_and_keeps_pure_noise():
    torch.testing.assert_close(reindexed(ZERO_TERMINAL, 1.0).sigmas, ZERO_TERMINAL.sigmas, rtol=1e-15, atol=0)
    doubled = reindexed(ZERO_TERMINAL, 2.0)
    assert doubled.alphas[-1].item() == 0
    torch.testing.assert_close(doubled.ve_sigmas[:-1], 2 * ZERO_TERMINAL.ve_sigmas[:-1], rtol=1e-12, atol=0)
