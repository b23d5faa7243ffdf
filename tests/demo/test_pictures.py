from dataclasses import replace

import numpy as np
import pytest

from aquatint.demo.pictures import COLORS, GROUNDS, PLACES, Scene, draw, examples, scenes
from aquatint.demo.run import prompts
from aquatint.demo.score import look


@pytest.mark.parametrize("scene", scenes()[::5], ids=lambda scene: scene.caption.replace(" ", "_"))
def test_a_drawn_scene_is_measured_as_what_its_caption_says(scene: Scene):
    seen = look(draw(scene, (128, 128), radius=0.3))
    assert (seen.ground, seen.color, seen.place, seen.shape) == (scene.ground, scene.color, scene.place, scene.shape)
    assert seen.obeys(scene)


def test_a_picture_of_something_else_does_not_obey():
    scene = Scene("red", "circle", "on the left", "white")
    for change in ({"color": "blue"}, {"place": "at the top"}, {"ground": "black"}):
        assert not look(draw(replace(scene, **change), (128, 128))).obeys(scene)


def test_an_empty_picture_and_noise_obey_nothing():
    scene = Scene("red", "circle", "on the left", "white")
    empty = np.full((128, 128, 3), 250, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert look(empty).color is None
    assert not look(empty).obeys(scene)
    assert not look(noise).obeys(scene)


def test_the_set_has_at_least_six_aspect_ratios_and_every_attribute():
    pictures = list(examples(576, seed=0))
    assert len({round(picture.shape[1] / picture.shape[0], 2) for _, picture in pictures}) >= 6
    assert {scene.color for scene, _ in pictures} == set(COLORS)
    assert {scene.ground for scene, _ in pictures} == set(GROUNDS)
    assert len({scene for scene, _ in pictures}) == len(scenes())


def test_the_set_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = (list(examples(20, seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) and s == t for (s, a), (t, b) in zip(first, again, strict=True))
    assert [scene for scene, _ in first] != [scene for scene, _ in other]


def test_the_prompts_cover_every_color_shape_place_and_ground():
    chosen = prompts()
    assert {s.color for s in chosen} == set(COLORS)
    assert {s.ground for s in chosen} == set(GROUNDS)
    assert len({s.shape for s in chosen}) == 3
    assert len({s.place for s in chosen}) == 4
    assert {(s.place, s.ground) for s in chosen} == {(place, ground) for place in PLACES for ground in GROUNDS}
    assert len(set(chosen)) == 16
