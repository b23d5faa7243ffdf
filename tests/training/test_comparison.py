import dataclasses

import numpy as np
import pytest
import torch

from aquatint.data.crop import fit
from aquatint.data.image import BadImage
from aquatint.data.places import Place
from aquatint.errors import DataError
from aquatint.training import comparison


def subject(number: int, size_hw: tuple[int, int] = (64, 64)) -> comparison.Subject:
    return comparison.Subject(f"{number}.png", Place(f"/{number}.png"), bytes([number]) * 16, fit(size_hw, size_hw), f"picture {number}")


class Brightness:
    """An encoder of two numbers: the mean and the height."""

    digest = "none"

    def embed(self, pictures):
        return np.array([[picture.mean(), len(picture)] for picture in pictures], dtype=np.float32)


def test_pictures_that_cannot_be_read_are_left_out_with_their_reason():
    def read(one):
        if one.name == "1.png":
            raise BadImage("is a damaged PNG file")
        if one.name == "2.png":
            raise OSError("it is not a plain file")
        return np.full((8, 8, 3), one.digest[0], dtype=np.uint8)

    seen = []
    kept, rows, left_out = comparison.see_real(
        [subject(number) for number in range(5)], {"clip": Brightness()}, read, 2, lambda *counts: seen.append(counts)
    )
    assert [one.name for one in kept] == ["0.png", "3.png", "4.png"]
    assert rows["clip"].tolist() == [[0, 8], [3, 8], [4, 8]]
    assert left_out == {"1.png": "is a damaged PNG file", "2.png": "it is not a plain file"}
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_embeddings_of_made_pictures_stand_in_the_order_of_their_subjects():
    seen = []
    rows = comparison.see_made(
        [subject(number) for number in range(4)], {"clip": Brightness()},
        lambda indices: [np.full((8 + index, 8, 3), index, dtype=np.uint8) for index in indices],
        [[3, 0], [2], [1]], lambda *counts: seen.append(counts),
    )  # fmt: skip
    assert rows["clip"].tolist() == [[0, 8], [1, 9], [2, 10], [3, 11]]
    assert seen == [(2, 4), (3, 4), (4, 4)]


def test_a_batch_has_one_shape_and_one_length():
    subjects = [subject(0), subject(1, (64, 32)), subject(2), subject(3), subject(4)]
    embeds = [(torch.zeros(77 * chunks, 4), torch.zeros(4)) for chunks in (1, 1, 2, 1, 1)]
    assert list(comparison.drawn_together(subjects, embeds, 2)) == [[0, 3], [4], [1], [2]]


def test_a_set_compared_with_itself_is_no_distance_apart():
    rows = {name: np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32) for name in ("clip", "dinov2", "inception")}
    found = comparison.scores(rows, rows, rows["clip"])
    assert found == pytest.approx({"clip_score": 100, "clip_score_real": 100, "cmmd": 0, "fd_dinov2": 0, "fid": 0}, abs=1e-5)


def test_noise_is_keyed_by_content_alone():
    one = subject(7)
    moved = dataclasses.replace(one, name="else.png", caption="another")
    assert one.noise_position == moved.noise_position != subject(8).noise_position


def test_a_kept_picture_is_known_by_all_that_decides_it(tmp_path):
    shelf, one = comparison.Shelf(tmp_path, "recipe"), subject(1)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    shelf.keep(one, picture)
    np.testing.assert_array_equal(shelf.read(one), picture)
    assert shelf.read(dataclasses.replace(one, name="renamed.png")) is not None
    assert shelf.read(dataclasses.replace(one, caption="another")) is None
    assert shelf.read(subject(2)) is None
    assert comparison.Shelf(tmp_path, "another").read(one) is None


def test_a_damaged_kept_picture_is_named(tmp_path):
    shelf, one = comparison.Shelf(tmp_path, "recipe"), subject(1)
    shelf.path(one).write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with pytest.raises(DataError, match=shelf.path(one).name):
        shelf.read(one)
