import numpy as np
import pytest
import torch

from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.models.sdxl.generate import generate, to_uint8
from aquatint.models.sdxl.load import open_base

SIZE = {"height": 64, "width": 96, "num_steps": 3}


@pytest.fixture(scope="module")
def parts(tiny_base):
    base = open_base(tiny_base)
    encoder = base.caption_encoder("cpu")
    encoded = {text: encoder.encode([text])[0] for text in ("a red circle", "a blue square", "", "tag, " * 80)}
    return base.load_unet(), base.load_vae(), encoded


def prompt(encoded, *texts):
    return torch.stack([encoded[text][0] for text in texts]), torch.stack([encoded[text][1] for text in texts])


def make(parts, positive, negative=None, *, prediction="v_prediction", ztsnr=True, positions=(0,), scale=3.0, **others):
    unet, vae, _ = parts
    schedule = sdxl_schedule(zero_terminal_snr=ztsnr)
    return generate(
        unet, vae, schedule, prediction, positive, negative, positions=positions, guidance_scale=scale, **{"seed": 0, **SIZE, **others}
    )


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
    assert len(calls) == SIZE["num_steps"]
    make(parts, prompt(parts[2], "a red circle"), scale=2.0)
    handle.remove()
    assert len(calls) == 3 * SIZE["num_steps"]


def test_the_negative_text_may_have_another_length(parts):
    encoded = parts[2]
    assert make(parts, prompt(encoded, "tag, " * 80), prompt(encoded, "a blue square")).shape == (1, 64, 96, 3)


def test_rescaled_guidance_changes_the_picture(parts):
    positive = prompt(parts[2], "a red circle")
    assert not np.array_equal(make(parts, positive, scale=7.0), make(parts, positive, scale=7.0, guidance_rescale=0.7))


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
