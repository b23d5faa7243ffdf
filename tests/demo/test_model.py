"""The demo's base model: real topology, and text encoders that tell words apart."""

import itertools

import pytest
import torch

from aquatint.demo.model import LOUDNESS, random_tensors, tiny_spec, write_tiny_base
from aquatint.demo.pictures import scenes
from aquatint.models.sdxl.load import open_base
from aquatint.models.sdxl.model import sdxl_spec
from aquatint.models.sdxl.process import Process
from tests.models.sdxl.small import small_spec


@pytest.fixture(scope="module")
def encoder(tiny_base):
    return open_base(tiny_base).caption_encoder("cpu")


def relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / ((a.norm() + b.norm()) / 2)).item()


def test_the_topology_is_sdxl_s():
    tiny, official = tiny_spec(), sdxl_spec()
    for key in ("down_block_types", "mid_block_type", "up_block_types", "layers_per_block", "addition_embed_type", "use_linear_projection"):
        assert tiny.unet[key] == official.unet[key]
    assert len(tiny.vae["block_out_channels"]) == 4
    assert tiny.text_encoder["vocab_size"] == tiny.text_encoder_2["vocab_size"] == 49408


def test_diffusers_can_tell_the_text_encoders_apart():
    spec = tiny_spec()
    assert spec.text_encoder["hidden_size"] != spec.text_encoder_2["hidden_size"]
    assert spec.text_encoder_2["projection_dim"] == spec.text_encoder_2["hidden_size"]
    assert spec.unet["cross_attention_dim"] == spec.text_encoder["hidden_size"] + spec.text_encoder_2["hidden_size"]


def test_different_words_have_clearly_different_embeddings(encoder):
    (red, red_pooled), (blue, blue_pooled) = encoder.encode(["red circle", "blue square"])
    assert relative_distance(red_pooled, blue_pooled) > 0.2
    assert relative_distance(red, blue) > 0.2


def test_one_changed_word_shows_in_both_embeddings(encoder):
    some = scenes()[::17]
    encoded = dict(zip(some, encoder.encode([scene.caption for scene in some]), strict=True))
    for one, other in itertools.combinations(some, 2):
        assert relative_distance(encoded[one][0], encoded[other][0]) > 0.1
        assert relative_distance(encoded[one][1], encoded[other][1]) > 0.05


def test_embeddings_are_as_loud_as_meant(encoder):
    hidden, pooled = zip(*encoder.encode([scene.caption for scene in scenes()[::9]]), strict=True)
    for tensor in (torch.stack(hidden)[..., :32], torch.stack(hidden)[..., 32:], torch.stack(pooled)):
        assert 0.5 < tensor.square().mean().sqrt() / LOUDNESS < 2


def test_with_captions_only_what_tells_them_apart_is_left_in_the_pooled_embedding(tmp_path):
    captions = [scene.caption for scene in scenes()[::9]]
    write_tiny_base(tmp_path / "base", seed=0, captions=captions)
    pooled = torch.stack([pooled for _, pooled in open_base(tmp_path / "base").caption_encoder("cpu").encode(captions)])
    assert pooled.mean(dim=0).norm() < 1e-4 * pooled.norm(dim=1).mean()


def test_the_untrained_unet_neither_dies_nor_explodes(tiny_base):
    from aquatint.models.sdxl.model import predict

    unet = open_base(tiny_base).load_unet()
    generator = torch.Generator().manual_seed(0)
    noisy, embeds, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 77, 80), (2, 48)))
    with torch.no_grad():
        output = predict(unet, noisy, torch.tensor([0, 999]), embeds, pooled, torch.full((2, 6), 128.0))
    assert 0.05 < output.std() < 2


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_tiny_base(tmp_path / name, seed=seed, spec=small_spec())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_trained_autoencoder_keeps_its_own_dtype(tmp_path):
    vae = {name: value.load().half() for name, value in random_tensors("vae", small_spec(), seed=9).items()}
    write_tiny_base(tmp_path / "base", seed=0, spec=small_spec(), vae_tensors=vae, process=Process("v_prediction", zero_terminal_snr=True))
    base = open_base(tmp_path / "base")
    loaded = base.load_vae().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in vae.items())
    assert (base.process.prediction, base.process.zero_terminal_snr) == ("v_prediction", True)
