import numpy as np
import pytest
import torch

from aquatint.models.sdxl.generate import Steps, generate, to_uint8
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.process import PLAYGROUND_SCALING, STANDARDISED, Process

SIZE = {"height": 64, "width": 96}
NUM_STEPS = 3
V_ZTSNR = Process("v_prediction", zero_terminal_snr=True)


@pytest.fixture(scope="module")
def parts(tiny_base):
    base = open_base(tiny_base)
    encoder = base.caption_encoder("cpu")
    encoded = {text: encoder.encode([text])[0] for text in ("a red circle", "a blue square", "", "tag, " * 80)}
    return base.load_unet(), base.load_vae(), encoded


def prompt(encoded, *texts):
    return torch.stack([encoded[text][0] for text in texts]), torch.stack([encoded[text][1] for text in texts])


def make(parts, positive, negative=None, *, process=V_ZTSNR, positions=(0,), scale=3.0, seed=0, schedule=None, **steps):
    unet, vae, _ = parts
    return generate(
        unet, vae, schedule or process.schedule(), process.prediction, positive, negative, steps=Steps(NUM_STEPS, scale, **steps),
        positions=positions, seed=seed, sigma_data=process.sigma_data, scaling=process.latents, **SIZE,
    )  # fmt: skip


def test_pictures_have_the_size_that_was_asked_for(parts):
    pictures = make(parts, prompt(parts[2], "a red circle", "a blue square"), positions=[0, 1])
    assert (pictures.shape, pictures.dtype) == ((2, 64, 96, 3), np.uint8)
    assert pictures.std() > 1


def test_a_picture_depends_on_its_position_and_not_on_its_company(parts):
    encoded = parts[2]
    together = make(parts, prompt(encoded, "a red circle", "a blue square"), positions=[4, 5])
    alone = make(parts, prompt(encoded, "a blue square"), positions=[5])
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    elsewhere = make(parts, prompt(encoded, "a blue square"), positions=[6])
    assert np.abs(alone.astype(int) - elsewhere).mean() > 1


def test_the_same_call_gives_the_same_picture(parts):
    positive = prompt(parts[2], "a red circle")
    assert np.array_equal(make(parts, positive), make(parts, positive))
    assert not np.array_equal(make(parts, positive), make(parts, positive, seed=1))


def test_no_negative_means_zeros(parts):
    positive = prompt(parts[2], "a red circle")
    zeros = tuple(torch.zeros_like(tensor) for tensor in positive)
    assert np.array_equal(make(parts, positive), make(parts, positive, zeros))
    assert not np.array_equal(make(parts, positive), make(parts, positive, prompt(parts[2], "")))


def test_guidance_of_one_asks_once(parts):
    unet, calls = parts[0], []
    handle = unet.register_forward_hook(lambda *_: calls.append(1))
    make(parts, prompt(parts[2], "a red circle"), scale=1.0)
    assert len(calls) == NUM_STEPS
    make(parts, prompt(parts[2], "a red circle"), scale=2.0)
    handle.remove()
    assert len(calls) == 3 * NUM_STEPS


def test_the_negative_text_may_have_another_length(parts):
    encoded = parts[2]
    assert make(parts, prompt(encoded, "tag, " * 80), prompt(encoded, "a blue square")).shape == (1, 64, 96, 3)


def test_rescaled_guidance_changes_the_picture(parts):
    positive = prompt(parts[2], "a red circle")
    assert not np.array_equal(make(parts, positive, scale=7.0), make(parts, positive, scale=7.0, guidance_rescale=0.7))


PROCESSES = {
    "epsilon": Process(),
    "x0": Process("x0", zero_terminal_snr=True),
    "flow": Process("flow"),
    "v told the noise": Process("v_prediction", edm_ve_sigmas=(0.002, 120.0)),
    "EDM": Process("edm", edm_ve_sigmas=(0.002, 80.0), latents=PLAYGROUND_SCALING),
    "standardised": Process("v_prediction", zero_terminal_snr=True, latents=STANDARDISED),
}


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_every_process_is_drawn_by_every_sampler_that_suits_it(parts, process):
    positive = prompt(parts[2], "a red circle")
    grid = "karras" if process.edm_ve_sigmas else "trailing"
    euler, ancestral = (make(parts, positive, process=process, grid=grid, sampler=sampler) for sampler in ("euler", "euler_ancestral"))
    assert euler.std() > 1
    assert not np.array_equal(euler, ancestral)
    assert np.array_equal(ancestral, make(parts, positive, process=process, grid=grid, sampler="euler_ancestral"))


def test_the_unet_is_told_the_noise_in_the_terms_of_its_process(parts, monkeypatch):
    told = {}
    for name in ("epsilon", "flow", "EDM"):
        seen = told[name] = []
        monkeypatch.setattr("aquatint.models.sdxl.generate.predict", lambda unet, x, t, *_, seen=seen: seen.append(t[0].item()) or 0 * x)
        make(parts, prompt(parts[2], "a red circle"), process=PROCESSES[name], scale=1.0, grid="karras" if name == "EDM" else "trailing")
    assert told["epsilon"] == [999, 666, 332]
    assert told["flow"] == pytest.approx([1000, 667, 333])
    assert (told["EDM"][0], told["EDM"][-1]) == pytest.approx((np.log(80) / 4, np.log(0.002) / 4))


def test_a_stand_in_for_infinity_changes_little(parts):
    positive = prompt(parts[2], "a red circle")
    exact, stand_in = (make(parts, positive, schedule=one) for one in (V_ZTSNR.schedule(), V_ZTSNR.schedule().ending_at(20000.0)))
    assert np.abs(exact.astype(int) - stand_in).mean() < 1


def test_nothing_is_left_behind(parts):
    unet = parts[0]
    unet.train()
    state = torch.get_rng_state()
    make(parts, prompt(parts[2], "a red circle"))
    assert unet.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in unet.parameters())
    unet.eval()


def test_colours_are_rounded_and_kept_in_range():
    values = torch.tensor([-1.0, 1.0, 0.0, 2.0, -2.0, 0.0040]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 255, 128, 255, 0, 128]
