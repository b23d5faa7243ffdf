from pathlib import Path

import numpy as np
import pytest

from aquatint.config.schema import Config
from aquatint.data.manifest import Manifest, Picture
from aquatint.training.prepare import lay_out, plan_digest
from tests.runs import small_config

DIGESTS = {"vae": "a", "text_encoders": "b"}
SIZES_HW = [(64, 64), (48, 80), (80, 48), (64, 64)]


def manifest(count: int = 40, *, rename: str = "", caption: str = "a red circle", repeats: int = 1) -> Manifest:
    rng = np.random.default_rng(0)
    pictures = tuple(
        Picture(Path(f"{rename}{i}.png"), f"{rename}{i}.png", rng.bytes(16).hex(), SIZES_HW[i % 4], caption, repeats) for i in range(count)
    )
    return Manifest(pictures, ())


@pytest.fixture
def config(tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    return lambda **sections: small_config(tmp_path, tmp_path / "base.safetensors", **sections)


def digest(config: Config, pictures: Manifest) -> str:
    return plan_digest(config, lay_out(config, pictures, DIGESTS))


def test_every_picture_is_trained_or_held_out(config):
    layout = lay_out(config(), manifest(), DIGESTS)
    trained = {item.name for group in layout.train for item in group}
    held_out = {item.name for group in layout.held_out for item in group}
    assert len(held_out) == 2
    assert trained | held_out == {f"{i}.png" for i in range(40)}
    assert not trained & held_out


def test_nothing_is_held_out_when_validation_is_off(config):
    layout = lay_out(config(validation={"every": None}), manifest(), DIGESTS)
    assert sum(map(len, layout.train)) == 40
    assert layout.held_out == ()


def test_with_share_zero_the_measured_pictures_are_trained_too(config):
    layout = lay_out(config(validation={"share": 0.0}), manifest(), DIGESTS)
    assert sum(map(len, layout.train)) == 40
    assert sum(map(len, layout.held_out)) == 2


def test_repeats_count_in_training_and_not_in_validation(config):
    layout = lay_out(config(), manifest(repeats=3), DIGESTS)
    assert sum(map(len, layout.train)) == 3 * 38
    assert sum(map(len, layout.held_out)) == 2


def test_renaming_files_changes_nothing(config):
    assert digest(config(), manifest()) == digest(config(), manifest(rename="holiday/"))


@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"batch_size": 3}},
        {"training": {"accumulation_steps": 2}},
        {"run": {"name": "test", "seed": 1}},
        {"crop": {"flip_prob": 0.5}},
        {"buckets": {"resolution": 96}},
        {"captions": {"dropout_prob": 0.2}},
    ],
)
def test_what_decides_a_batch_is_in_the_digest(config, sections: dict):
    assert digest(config(**sections), manifest()) != digest(config(), manifest())


@pytest.mark.parametrize(
    "sections", [{"training": {"length": "99 steps"}}, {"optimizer": {"learning_rate": 1e-2}}, {"samples": {"prompts": ["x"]}}]
)
def test_what_does_not_decide_a_batch_is_not(config, sections: dict):
    assert digest(config(**sections), manifest()) == digest(config(), manifest())


def test_another_caption_or_encoder_is_another_entry(config):
    layouts = [
        lay_out(config(), manifest(), DIGESTS),
        lay_out(config(), manifest(caption="a blue square"), DIGESTS),
        lay_out(config(), manifest(), DIGESTS | {"text_encoders": "c"}),
        lay_out(config(), manifest(), DIGESTS | {"vae": "d"}),
    ]
    first, caption, text, vae = ((set(layout.wanted.latents), set(layout.wanted.captions)) for layout in layouts)
    assert caption[0] == first[0]
    assert caption[1] != first[1]
    assert text[0] == first[0]
    assert not text[1] & first[1]
    assert not vae[0] & first[0]
    assert vae[1] == first[1]


def test_random_crops_and_mirrors_are_views_of_one_item(config):
    layout = lay_out(config(crop={"mode": "random", "variants": 3, "flip_prob": 0.5}), manifest(), DIGESTS)
    items = [item for group in layout.train for item in group]
    assert {len(item.views) for item in items} == {6}
    assert max(len({view.latent_key for view in item.views}) for item in items) == 6  # a picture that just fits has only one crop
