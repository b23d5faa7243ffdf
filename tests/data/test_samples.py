import pickle

import numpy as np
import pytest

from aquatint.data.samples import NO_KEY, Ragged, Samples, Words, by_bucket


def keys(*values):
    return np.frombuffer(b"".join(value.ljust(16, b".") for value in values), np.uint8).reshape(-1, 16)


def samples(**changes):
    values = {
        "names": Words.of(["a", "b", "c"]), "bucket_starts": np.array([0, 2, 3]), "sources": np.zeros(3, np.int16),
        "latent_keys": keys(b"a", b"b", b"c").reshape(3, 1, 16), "time_ids": np.zeros((3, 1, 6), np.int32),
        "loss_weights": np.ones(3, np.float32), "text_of": Ragged.of([1, 3, 1]), "text_keys": keys(b"1", b"2", b"3", b"4", b"5"),
        "text_weights": np.array([1, 0.5, 0.25, 0.25, 1], np.float32),
    }  # fmt: skip
    return Samples(**{**values, **changes})


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "ü🐈", "b" * 1000], ["\udc80 odd name"]])
def test_texts_in_a_column_are_the_texts(texts):
    column = Words.of(texts)
    assert [column[row] for row in range(len(column))] == texts


def test_rows_have_as_many_entries_as_they_said():
    ragged = Ragged.of([2, 0, 3])
    assert [list(ragged[row]) for row in range(3)] == [[0, 1], [], [2, 3, 4]]


def test_a_text_is_drawn_by_its_weight():
    one = samples()
    drawn = [one.draw_text(1, number) for number in np.linspace(0, 1, 400, endpoint=False)]
    assert [drawn.count(text) for text in (1, 2, 3)] == [200, 100, 100]
    assert one.draw_text(0, 0.99) == 0
    assert one.draw_text(1, np.nextafter(1, 0)) == 3


def test_buckets_are_ranges_of_rows():
    assert samples().buckets() == [range(0, 2), range(2, 3)]


def test_a_view_without_a_mask_has_no_key():
    masked = samples(mask_keys=keys(b"m", b"", b"n").reshape(3, 1, 16) * np.array([1, 0, 1], np.uint8)[:, None, None])
    assert masked.mask_key(0, 0) == b"m".ljust(16, b".")
    assert masked.mask_key(1, 0) is None
    assert masked.has_masks
    assert samples().mask_key(0, 0) is None
    assert not samples().has_masks
    assert not samples(mask_keys=np.frombuffer(NO_KEY * 3, np.uint8).reshape(3, 1, 16)).has_masks


def test_rows_are_ordered_by_bucket_source_and_content():
    digests = keys(b"d", b"c", b"b", b"a", b"a")
    order = by_bucket(np.array([1, 0, 0, 0, 1]), np.array([0, 1, 0, 0, 0]), digests)
    assert order.tolist() == [3, 2, 1, 4, 0]


def test_pictures_of_equal_content_keep_their_order():
    assert by_bucket(np.zeros(3, int), np.zeros(3, int), keys(b"x", b"x", b"a")).tolist() == [2, 0, 1]


def test_samples_can_be_sent_to_workers():
    again = pickle.loads(pickle.dumps(samples()))
    assert again.names[1] == "b"
    assert (again.text_keys == samples().text_keys).all()
