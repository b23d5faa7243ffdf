"""Captions that are encoded in the step: the same numbers as from the cache, and gradients for what the UNet hears."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from aquatint.data.batch import Batch
from aquatint.diffusion.schedule import sdxl_schedule
from aquatint.models.recompute import recompute
from aquatint.models.sdxl.load import BaseModel, open_base
from aquatint.models.sdxl.shapes import TEXT_ENCODERS, qualified
from aquatint.models.sdxl.tokenizer import num_chunks
from aquatint.optim.clipping import Clipping
from aquatint.training.dry_step import Size, full_captions
from aquatint.training.objective import Objective
from aquatint.training.online_text import with_embeddings
from aquatint.training.step import Parts, losses_of
from aquatint.training.text_training import TextTraining, join_encoders

CAPTIONS = ("a red circle", None, "", "blue, " * 40, "a red circle")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_base) -> BaseModel:
    return open_base(tiny_base)


def joined(base, trained=TEXT_ENCODERS, unet=None, **settings) -> tuple[torch.nn.Module, TextTraining]:
    unet = torch.nn.Module() if unet is None else unet
    texts = TextTraining(join_encoders(unet, base, trained, dtype=torch.float32, device=CPU), autocast=False, **settings)
    return unet.requires_grad_(True), texts


def batch(captions=CAPTIONS) -> Batch:
    size, draw = len(captions), torch.Generator().manual_seed(0)
    return Batch(
        latents=torch.randn(size, 4, 8, 8, generator=draw), noise=torch.randn(size, 4, 8, 8, generator=draw),
        timesteps=torch.arange(size) * 100, prompt_embeds=None, pooled_prompt_embeds=None, time_ids=torch.full((size, 6), 64.0),
        loss_weights=torch.ones(size), names=("",) * size, positions=tuple(range(size)), sources=(0,) * size, captions=captions,
    )  # fmt: skip


def gradients(unet) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.grad is not None}


def test_the_unet_is_told_what_it_was_told_from_the_cache(base):
    _, texts = joined(base)
    encoder = base.caption_encoder("cpu")
    expected = with_embeddings(batch(), CAPTIONS, encoder, encoder.encode([""])[0])
    found = texts.told(batch())
    assert found.prompt_embeds.shape == (5, 154, 80)
    torch.testing.assert_close(found.prompt_embeds, expected.prompt_embeds)
    torch.testing.assert_close(found.pooled_prompt_embeds, expected.pooled_prompt_embeds)
    assert not found.prompt_embeds[1].any()
    assert not found.pooled_prompt_embeds[1].any()
    for one, other in zip(texts.encode(["a", "b"]), encoder.encode(["a", "b"]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("trained", [TEXT_ENCODERS, ("text_encoder",), ("text_encoder_2",)])
def test_gradients_reach_just_what_is_said_to_be_trained(base, trained):
    unet, texts = joined(base, trained)
    assert not texts.encoders.clip.training
    found = texts.told(batch())
    (found.prompt_embeds.square().sum() + found.pooled_prompt_embeds.square().sum()).backward()
    heard = {qualified(one, name): shape for one in trained for name, shape in base.spec.heard_shapes(one).items()}
    assert {name: tuple(gradient.shape) for name, gradient in gradients(unet).items()} == heard
    assert all(gradient.any() for name, gradient in gradients(unet).items() if not name.endswith("k_proj.bias"))  # softmax ignores it
    others = [one for name, one in zip(TEXT_ENCODERS, (texts.encoders.clip, texts.encoders.bigg), strict=True) if name not in trained]
    assert not any(parameter.requires_grad for one in others for parameter in one.parameters())


def test_from_its_end_on_no_gradient_goes_into_a_text_encoder(base):
    _, texts = joined(base, end=3)
    assert texts.told(batch(), step=2).prompt_embeds.requires_grad
    assert not texts.told(batch(), step=3).prompt_embeds.requires_grad
    with torch.no_grad():
        assert not texts.told(batch()).prompt_embeds.requires_grad


@pytest.mark.parametrize(
    ("captions", "asked"),
    [(("b", None, "a", "b"), ["a", "b"]), ((None, None), [""]), (("a", "", None), ["", "a"]), (("a", "a, " * 50), ["", "a", "a, " * 50])],
)
def test_only_what_is_needed_is_encoded_and_once(captions, asked):
    seen = []

    def embed(texts):
        seen.extend(texts)
        return [(torch.ones(77 * count, 4), torch.ones(3)) for count in num_chunks(texts)]

    texts = TextTraining(SimpleNamespace(embed=embed, clip=SimpleNamespace(device=CPU)), autocast=False)
    found = texts.told(batch(captions))
    assert seen == asked
    assert found.pooled_prompt_embeds[:, 0].tolist() == [float(caption is not None) for caption in captions]


@pytest.fixture(scope="module")
def own(base) -> Parts:
    unet, texts = joined(base, unet=base.load_unet(torch.float32))
    return Parts(
        unet=unet, optimizer=None, ema=None, objective=Objective(sdxl_schedule(zero_terminal_snr=False), "epsilon", torch.ones(1000)),
        learning_rate=lambda step: 0.0, autocast=False, clipping=Clipping("global", 1.0), device=CPU, texts=texts,
    )  # fmt: skip


def test_losses_are_those_of_cached_captions(base, own):
    encoder = base.caption_encoder("cpu")
    cached = with_embeddings(batch(), CAPTIONS, encoder, encoder.encode([""])[0])
    with torch.no_grad():
        found, expected = losses_of(own, batch())[0], losses_of(replace(own, texts=None), cached)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("what", ["pointwise", pytest.param(True, marks=pytest.mark.long)])
def test_recomputing_changes_no_bit_and_draws_no_random_number(own, what):
    few = batch(("a", "b b"))
    losses_of(own, few)[0].sum().backward()
    plain, state = gradients(own.unet), torch.get_rng_state()
    own.unet.zero_grad(set_to_none=True)
    recompute(own.unet, what)
    own.unet.train()
    losses_of(own, few)[0].sum().backward()
    again = gradients(own.unet)
    own.unet.zero_grad(set_to_none=True)
    own.unet.disable_gradient_checkpointing()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_captions_of_a_dry_step_are_as_long_as_any_and_all_different():
    captions = full_captions(Size(3, 64, 64, 231, (80, 48)))
    assert num_chunks(captions) == [3, 3, 3]
    assert len(set(captions)) == 3
